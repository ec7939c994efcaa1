"""Every module can be imported where the system lacks what only some have: Windows and macOS among them."""

import subprocess
import sys
from textwrap import dedent

ABSENT_MODULES = ("resource", "fcntl", "termios", "tty", "pwd", "grp")
EXTRAS = ("lm_eval", "wandb", "mlflow", "tensorboard", "bitsandbytes")  # that this environment may lack
ABSENT_NAMES = (
    "os.fork", "os.register_at_fork", "os.getuid", "os.geteuid", "os.sysconf", "os.setpriority", "os.sched_getaffinity",
    "os.killpg", "os.setsid", "os.O_DIRECTORY", "os.statvfs", "signal.SIGHUP", "signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGALRM",
    "signal.SIGTSTP", "signal.SIGCONT", "signal.SIGWINCH", "signal.SIGPIPE", "signal.pthread_kill", "signal.sigwait",
)  # fmt: skip

# Other libraries have ways of their own for such systems, by ``sys.platform``: they are imported before anything is taken away.
CHILD = dedent("""
    import importlib, os, pkgutil, signal, sys

    import datasets, peft, pyarrow, rich.console, torch, torch.distributed, transformers, typer
    import torch.distributed.elastic.multiprocessing.api
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name in {modules!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            return None

    sys.meta_path.insert(0, Missing())
    for name in {modules!r}:
        sys.modules.pop(name, None)
    for name in {names!r}:
        module, _, attribute = name.partition(".")
        if hasattr(sys.modules[module], attribute):
            delattr(sys.modules[module], attribute)
    gone = {{name.partition(".")[2] for name in {names!r}}}
    kept = {{name: value for name, value in signal.Signals.__members__.items() if name not in gone}}
    class Signals:
        __members__ = kept
        def __class_getitem__(cls, name):
            return kept[name]
        def __new__(cls, number):
            return next(value for value in kept.values() if value == number)
    signal.Signals = Signals
    failed = []
    for found in pkgutil.walk_packages(importlib.import_module("sftcli").__path__, "sftcli."):
        if found.name == "sftcli.__main__":
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name not in {extras!r}:
                failed.append(f"{{found.name}}: {{error}}")
        except Exception as error:
            failed.append(f"{{found.name}}: {{type(error).__name__}}: {{error}}")
    print(*failed, sep="\\n", end="")

    from sftcli.cli.session.signals import STOP_SIGNALS
    from sftcli.cache import cache_folder
    from sftcli.runtime import peak_memory_bytes, total_memory_bytes

    cpu = torch.device("cpu")
    print(peak_memory_bytes(cpu), total_memory_bytes(cpu), cache_folder().is_dir(), *sorted(one.name for one in STOP_SIGNALS))
""")


def test_every_module_is_imported_without_what_posix_alone_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SFT_CACHE_DIR", raising=False)
    code = CHILD.format(modules=ABSENT_MODULES, names=ABSENT_NAMES, extras=EXTRAS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # No module fails, what cannot be told is 0, the cache needs no owner, and the signals are those that are there.
    assert (done.returncode, done.stdout.strip()) == (0, "0 0 True SIGINT SIGTERM"), done.stderr
