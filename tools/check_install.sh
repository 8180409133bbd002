#!/usr/bin/env bash
# Installs as README.md says, in new environments, and tries the package outside the clone: takes
# minutes and needs the network. It runs on a copy of the clone; wheels beside the clone are used.
# First PyTorch alone, with networks of torchvision and timm; `core` ends there.
#   [PYTHON=python3] [FOLDER=/new/folder] tools/check_install.sh [core]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-$(mktemp -d)}
unset PYTHONPATH
if [ -d ../shared/wheels ]; then
    export PIP_FIND_LINKS="${PIP_FIND_LINKS:-} $(cd ../shared/wheels && pwd)"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 SECONDS=0
say() { echo "== $SECONDS s: $*"; }

# blocks LANGUAGE PATTERN: the first block of the README in this language that has the pattern.
blocks() {
    "$PYTHON" - "$@" <<'PY'
import pathlib, re, sys
language, pattern = sys.argv[1:]
found = re.findall(rf'```{language}\n(.*?)```', pathlib.Path('README.md').read_text(), re.S)
print(next(block for block in found if re.search(pattern, block)), end='')
PY
}

mkdir -p "$FOLDER/clone" "$FOLDER/elsewhere"
git ls-files -z | xargs -0 cp --parents --no-dereference -t "$FOLDER/clone"
blocks bash 'pip install' | grep '^pip install' > "$FOLDER/install.sh"
blocks python _base_ > "$FOLDER/elsewhere/my_config.py"
# install ENVIRONMENT SCRIPT: makes an environment, makes it current, and installs in the clone.
install() {
    "$PYTHON" -m venv --clear "$FOLDER/$1"
    export PATH="$FOLDER/$1/bin:$PATH"
    cat "$FOLDER/$2"
    (cd "$FOLDER/clone" && bash -euo pipefail "$FOLDER/$2" > "$FOLDER/$1.log")
}

say 'PyTorch alone'
# The README's lines without mmcv and extras.
sed -e '/mmcv/d' -e "s/'\.\[.*\]'/./" "$FOLDER/install.sh" > "$FOLDER/install-core.sh"
install core install-core.sh
say 'mmkw is installed; now torchvision and timm'
# Of torchvision the Python part is enough, and it needs no operators of CUDA's torch.
pip install numpy pillow requests pyyaml huggingface_hub safetensors > "$FOLDER/networks.log"
pip install --no-deps torchvision==0.16.2 timm==1.0.29 >> "$FOLDER/networks.log"
(cd "$FOLDER/elsewhere" && python -W ignore - <<'PY'
import copy
import sys
import timm
import torch
import torchvision
import mmkw
assert not {'mmengine', 'mmcv'} & set(sys.modules)
torch.manual_seed(0)
for name, static in {
    'torchvision resnet18': torchvision.models.resnet18(num_classes=10),
    'timm convnext_atto': timm.create_model('convnext_atto', num_classes=10),
}.items():
    dynamic = mmkw.convert(copy.deepcopy(static))
    images, labels = torch.rand(4, 3, 64, 64), torch.arange(4)
    with torch.no_grad():
        expected = static.eval()(images)
        difference = float((dynamic.eval()(images) - expected).abs().max() / expected.abs().max())
    assert difference < 1e-5, (name, difference)
    optimizer = torch.optim.AdamW(dynamic.train().parameters(), 1e-4)
    losses = []
    for step in range(10):
        loss = torch.nn.functional.cross_entropy(dynamic(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (name, losses)
    print(f'{name}: differs by {difference:.1e}, loss {losses[0]:.2f} -> {losses[-1]:.2f}')
PY
)
say 'two networks are converted and trained'
[ "${1:-}" = core ] && exit

say 'all that developing takes, beside the torch that PyPI has for this system'
# Nothing is installed. On Linux that torch is built for CUDA, and names a release of Triton.
(cd "$FOLDER/clone" && PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= pip install --dry-run \
    --ignore-installed --no-build-isolation "$(grep -o 'torch==[0-9.]*' "$FOLDER/install.sh")" \
    '.[dev,docs]' > "$FOLDER/developing.log")

say 'installing as the README says'
install venv install.sh
rm -r "$FOLDER/clone"
say 'installed; now mim, and what the mini data set is made of'
pip install openmim==0.3.9 scikit-image scikit-learn > "$FOLDER/install-mim.log"
cd "$FOLDER/elsewhere"
export PYTHONWARNINGS=ignore
mmkw info

say 'config by its name, with nothing else imported than what MMEngine needs'
python - <<'PY'
from mmengine.hub import get_config, get_model
from mmengine.config import Config
import pathlib
name = 'mmkw::mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py'
pathlib.Path('by_name.py').write_text(f'_base_ = {name!r}\n')
assert Config.fromfile('by_name.py').model == get_config(name).model
print(type(get_model(name).backbone).__name__, get_config(name).filename)
PY
mmkw plan mmkw::mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py | tail -n 1

say 'mim search, download, run, train, test'
mim search mmkw --model 'mask r-cnn' --field backbone parameters > search.txt
grep -q kw1x-r50_fpn search.txt
mim download mmkw --config mask-rcnn_kw1x-r50_fpn_adamw-1x_coco --dest downloaded
mim run mmkw make_mini_coco data/mini_coco --train 8 --val 4
mim train mmkw mask-rcnn_kw1x-r18_fpn_mini-coco.py --work-dir work \
    --cfg-options train_cfg.max_epochs=1 train_dataloader.num_workers=0 \
    train_dataloader.persistent_workers=False > train.log 2>&1 || { tail -n 30 train.log; exit 1; }
grep 'coco/segm_mAP' train.log | tail -n 1
mim test mmkw mask-rcnn_kw1x-r18_fpn_mini-coco.py --checkpoint work/epoch_1.pth \
    --work-dir work > test.log 2>&1 || { tail -n 30 test.log; exit 1; }
grep 'coco/segm_mAP' test.log | tail -n 1

say "the README's example on the mini data set"
python - <<'PY'
from mmengine.config import Config
from mmkw.engine.building import read_config
config = Config.fromfile('my_config.py')
small = read_config('mmkw::demo/mask-rcnn_r18_fpn_mini-coco.py')
for part in ('train', 'val', 'test'):
    config[f'{part}_dataloader'] = small[f'{part}_dataloader']
    config[f'{part}_dataloader'].num_workers = 0
    config[f'{part}_dataloader'].persistent_workers = False
    if part != 'train':
        config[f'{part}_evaluator'] = small[f'{part}_evaluator']
        config[f'{part}_evaluator'].metric = 'bbox'
config.model.roi_head.bbox_head.num_classes = 10
# The weights are downloaded; here from nothing.
config.model.backbone.init_cfg = None
config.train_cfg.max_epochs = 1
config.dump('example.py')
PY
mim train mmkw example.py --work-dir example > example.log 2>&1 || { tail -n 30 example.log; exit 1; }
grep 'coco/bbox_mAP' example.log | tail -n 1

say 'inferencers by name, and a checkpoint with code in it'
python - <<'PY'
import glob, os
from mmdet.apis import DetInferencer
image = sorted(glob.glob('data/mini_coco/val/*.png'))[0]
found = DetInferencer('mask-rcnn_kw1x-r50_fpn_adamw-1x_coco', device='cpu')(image)
print(len(found['predictions'][0]['labels']), 'boxes of a random network')
try:
    from mmseg.apis import MMSegInferencer
except ImportError:
    print('no mmseg')
else:
    name = 'pspnet_kw1x-r50b-d8_4xb4-80k_coco-stuff164k-512x512'
    print(MMSegInferencer(name, device='cpu')(image)['predictions'].shape)
import torch
class Attack:
    def __reduce__(self):
        return os.mkdir, ('made',)
torch.save(dict(state_dict={}, extra=Attack()), 'attack.pth')
try:
    DetInferencer('by_name.py', 'attack.pth', device='cpu')
except RuntimeError as error:
    assert type(error).__name__ == 'UnsafeCheckpointError', error
assert not os.path.exists('made')
PY
say "all well, in $FOLDER"
