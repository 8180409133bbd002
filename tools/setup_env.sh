#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that the tests and the demo need, in the
# versions the project is tested with. Safe to repeat: done once, it does nothing; interrupted, it
# starts over (downloads and what was compiled are kept by pip's cache).
#   [PYTHON=python3] [VENV=.venv] tools/setup_env.sh           OpenMMLab's releases
#   [PYTHON=python3] [VENV=.venv-onedl] tools/setup_env.sh onedl    OneDL's
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
case "${1:-}" in
    '') prefix= ;;
    onedl) prefix=onedl- ;;
    *) echo "tools/setup_env.sh takes onedl or nothing, not $1" >&2; exit 2 ;;
esac
VENV=${VENV:-.venv${1:+-$1}}

# Prebuilt wheels beside the checkout spare the compilation of mmcv.
if [ -d ../shared/wheels ]; then
    export PIP_FIND_LINKS="${PIP_FIND_LINKS:-} $(cd ../shared/wheels && pwd)"
fi

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "mmkw needs Python 3.10 or newer; name one with PYTHON=..., this is: $("$PYTHON" -V)" >&2
    exit 1
fi
stamp="$VENV/.complete-$(cat setup.py mmkw/requirements.py mmkw/ops/csrc/* "$0" | cksum | cut -d ' ' -f 1)"
if [ -e "$stamp" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

echo "Setting up $VENV"
"$PYTHON" -m venv --clear "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
# The tested versions, name==version; of all distributions of this stack, or of one module.
tested() {
    "$VENV/bin/python" -c "import runpy, sys
prefix, *modules = sys.argv[1:]
supported = runpy.run_path('mmkw/requirements.py')['SUPPORTED']
for module, distributions in supported.items():
    for name, versions in distributions.items():
        ours = name.startswith('onedl-') == bool(prefix) or module == 'torch'
        if ours and module in (modules or supported):
            print(f'{name}=={versions.tested}')" "$prefix" "$@"
}
tested > "$VENV/constraints.txt"
# mmcv is compiled against the installed torch where there is no wheel of it: 10 to 20 minutes on
# two cores. ninja compiles on all of them.
pip install 'setuptools>=64,<82' wheel ninja "$(tested torch)"
pip install --no-build-isolation "$(tested mmcv)"
pip install --no-build-isolation -c "$VENV/constraints.txt" -e ".[${prefix}det,${prefix}seg,${prefix}cls,dev,docs]"
# Networks for the tests. MMPretrain needs torchvision, of which the Python part is enough here; PyPI's
# wheels of later releases do not import beside the CPU build of torch.
pip install --no-deps torchvision==0.16.2 timm==1.0.29
touch "$stamp"
