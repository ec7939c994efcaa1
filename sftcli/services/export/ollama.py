"""Write a model for Ollama: a GGUF file, and beside it what Ollama does not take from it."""

from dataclasses import replace

from sftcli import storage
from sftcli.events import Session, Warned
from sftcli.json_files import read_json
from sftcli.modeling.formats.logits import Agreement
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.services.export.gguf import write_gguf_file
from sftcli.services.export.request import HINT, ExportRequest
from sftcli.services.models.choose import ModelChoice
from sftcli.services.report.model_card import model_card
from sftcli.services.report.modelfile import Turns, find_shape, modelfile
from sftcli.services.report.usage import usage_of_gguf


def write_ollama_folder(
    request: ExportRequest, choice: ModelChoice, session: Session
) -> tuple[str, Agreement | None]:
    """Write a folder with a GGUF file, a ``Modelfile`` that names it, and a card; as ``write_gguf_file``."""
    tokenizer = load_chat_tokenizer(choice.tokenizer_folder)
    bos = read_tokenizer_files(choice.tokenizer_folder).named.get("bos_token", "")

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.render(messages, tools=None, add_generation_prompt=True)

    found = find_shape(render, bos)
    if found is None:
        session.emit(
            Warned(
                text="the chat template is of no shape that is written for Ollama, which takes one that it knows or none: "
                "compare with --verify-server ollama=NAME before you rely on its answers"
            )
        )
    shape, system = found or (None, "")
    name = f"{request.out.name}.gguf"
    usage = usage_of_gguf(name, request.out.name, is_on_hub=False)
    with storage.atomic_folder(request.out, hint=HINT, is_new=True) as fresh:
        written = write_gguf_file(replace(request, out=fresh / name), choice, session)
        texts = {
            "Modelfile": modelfile(
                name,
                shape=shape,
                system=system,
                stops=[tokenizer.decode([token], skip_special=False) for token in sorted(tokenizer.stop_ids)],
                sampling=_sampling_of(choice),
            ),
            "README.md": model_card(request.out.name, choice, usage),
        }
        for file, text in texts.items():
            storage.write_file(fresh / file, [text.encode()])
    return written


def _sampling_of(choice: ModelChoice) -> dict[str, float]:
    """Return what the generation settings of a model say about sampling, as Ollama names it; 0 where they take the likeliest."""
    path = choice.tokenizer_folder / "generation_config.json"
    stated = read_json(path) if path.is_file() else {}
    if not stated.get("do_sample"):
        return {"temperature": 0.0} if "do_sample" in stated else {}
    found = {name: stated.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
