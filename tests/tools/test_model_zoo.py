"""The model zoo agrees with the configs, and its check notices when it does not."""

import importlib
import shutil
import sys
from importlib import metadata

import pytest
import yaml
from command_util import run

pytest.importorskip('mmdet', reason='builds the configs of both libraries')
pytest.importorskip('mmseg', reason='builds the configs of both libraries')


def model_zoo(folder, *options):
    result, output = run(folder, sys.executable, 'tools/analysis_tools/model_zoo.py', *options)
    return result.returncode, output


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(
    any(metadata.distributions(name='onedl-mmdetection')),
    reason="OneDL's base configs have other weights' addresses, and its DINO another size",
)
def test_page_and_metafiles_agree_with_the_configs(root):
    code, output = model_zoo(root, '--check')
    assert code == 0, output


def test_every_config_is_in_the_zoo(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools/analysis_tools'))
    page = (root / 'docs/model_zoo.md').read_text()
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    folders = importlib.import_module('model_zoo').leaf_configs()
    assert index['Import'] == [f'configs/{name}/metafile.yml' for name in folders]
    for name, paths in folders.items():
        metafile = yaml.safe_load((root / f'configs/{name}/metafile.yml').read_text())
        configs = [str(path.relative_to(root)) for path in paths]
        assert [model['Config'] for model in metafile['Models']] == configs
        assert all(f'(../{config})' in page for config in configs)


@pytest.fixture
def small_zoo(root, tmp_path):
    """The tools with one config."""
    shutil.copytree(root / 'tools/analysis_tools', tmp_path / 'tools/analysis_tools')
    shutil.copytree(root / 'configs/_base_', tmp_path / 'configs/_base_')
    (tmp_path / 'configs/retinanet').mkdir()
    config = 'configs/retinanet/retinanet_kw1x-r50_fpn_1x_coco.py'
    shutil.copy(root / config, tmp_path / config)
    metafile = yaml.safe_load((root / 'configs/retinanet/metafile.yml').read_text())
    metafile['Models'] = [model for model in metafile['Models'] if model['Config'] == config]
    text = yaml.safe_dump(metafile, sort_keys=False, width=100)
    (tmp_path / 'configs/retinanet/metafile.yml').write_text(text)
    (tmp_path / 'docs').mkdir()
    return tmp_path


@pytest.mark.slow
def test_the_check_notices_what_is_out_of_date(small_zoo):
    metafile = small_zoo / 'configs/retinanet/metafile.yml'
    before = metafile.read_text()
    code, output = model_zoo(small_zoo)
    assert code == 0 and 'Written: docs/model_zoo.md, model-index.yml.' in output
    assert metafile.read_text() == before
    page = (small_zoo / 'docs/model_zoo.md').read_text()
    assert '[retinanet_kw1x-r50_fpn_1x_coco](../configs/retinanet/' in page
    index = yaml.safe_load((small_zoo / 'model-index.yml').read_text())
    assert index == dict(Import=['configs/retinanet/metafile.yml'])

    config = small_zoo / 'configs/_base_/backbones/kw1x-r50.py'
    config.write_text(config.read_text().replace('cell_num_ratio=1', 'cell_num_ratio=2'))
    code, output = model_zoo(small_zoo, '--check')
    assert code == 1
    assert 'Out of date: configs/retinanet/metafile.yml, docs/model_zoo.md' in output


def test_complexity_counts_what_is_known(root):
    """Static: everybody's tables. 1x: parameters of the paper's table without the classifier, and
    mixing, for which each of n mixtures multiplies all n cells, beside the small attentions."""
    folder = 'configs/mask_rcnn/mask-rcnn'
    configs = [f'{folder}_{name}_fpn_adamw-1x_coco.py' for name in ('r50', 'kw1x-r50')]
    command = [sys.executable, 'tools/analysis_tools/complexity.py', *configs]
    command += ['--shape', '224', '224']
    result, _ = run(root, *command)
    static, dynamic = result.stdout.splitlines()[-2:]
    assert 'backbone 23,508,032 parameters, 4.09 GFLOPs at 224 x 224' in static
    cells = ((87, 64), (104, 128), (138, 256), (47, 512))
    mixing = sum(n * n * side * side for n, side in cells) / 1e9
    assert f'backbone {28_052_310 - 2_049_000:,} parameters' in dynamic
    assert float(dynamic.split(' GFLOPs')[0].split()[-1]) == pytest.approx(4.09 + mixing, abs=0.01)
