#!/usr/bin/env bash
# Installs as README.md says, in a new environment, and tries the package outside the clone: takes
# minutes and needs the network. It runs on a copy of the clone; wheels beside the clone are used.
#   [PYTHON=python3] [FOLDER=/new/folder] tools/check_install.sh
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
"$PYTHON" -m venv --clear "$FOLDER/venv"
export PATH="$FOLDER/venv/bin:$PATH"

say 'installing as the README says'
cat "$FOLDER/install.sh"
(cd "$FOLDER/clone" && bash -euo pipefail "$FOLDER/install.sh" > "$FOLDER/install.log")
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
