#!/bin/sh
# Make .venv with the locked packages. Runs again only when the lock has changed; a broken attempt is repeated.
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/.ready
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(cksum < requirements.lock)" ] && [ -x .venv/bin/python ]; then exit 0; fi

fits() { "$1" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' >/dev/null 2>&1; }
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    found=$(${PYTHON:-python3} -c 'import platform; print("Python", platform.python_version())' 2>/dev/null || echo "no Python")
    echo "sadalib needs Python 3.11, 3.12 or 3.13 and found $found: install one of them, or name it with 'make PYTHON=/path/to/python3.12 ...'." >&2
    exit 1
fi
uv=$(command -v uv || true)
if [ -z "$uv" ] && ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    echo "$python cannot make environments: install its venv module (on Debian and Ubuntu: apt install python3-venv), or uv." >&2
    exit 1
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
if [ "$free" -lt 12 ]; then
    echo "the environment takes about 7 GB (12 GB while it is being made) and this disk has $free GB free: free some space and run again." >&2
    exit 1
fi

echo "Making .venv with $("$python" --version) and the packages of requirements.lock: several GB to download"
echo "(PyTorch with its CUDA libraries is most of it), 7 GB on disk; on a fast line 1 to 2 minutes with uv, 2 to 5 with pip."
rm -f "$stamp"
if [ -n "$uv" ]; then
    uv venv -q --allow-existing --python "$python" .venv
    uv pip install -q --compile-bytecode --python .venv/bin/python --require-hashes -r requirements.lock
    uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
else
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
cksum < requirements.lock > "$stamp"
echo "The environment is ready."
