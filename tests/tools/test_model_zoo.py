"""The model zoo agrees with the configs, and its check notices when it does not."""

import importlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import yaml
from command_util import run

pytest.importorskip('mmdet', reason='builds the configs of both libraries')
pytest.importorskip('mmseg', reason='builds the configs of both libraries')


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(
    any(metadata.distributions(name='onedl-mmdetection')),
    reason="OneDL's base configs have other weights' addresses, and its DINO another size",
)
def test_page_and_metafiles_agree_with_the_configs(root):
    command = [sys.executable, 'tools/analysis_tools/model_zoo.py', '--check']
    result, output = run(root, *command)
    assert result.returncode == 0, output


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
def small_zoo(root, tmp_path, monkeypatch):
    """One config, and the tool for it, without processes that import everything anew."""
    monkeypatch.syspath_prepend(str(root / 'tools/analysis_tools'))
    tool = importlib.import_module('model_zoo')
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'ProcessPoolExecutor', ThreadPoolExecutor)
    shutil.copytree(root / 'configs/_base_', tmp_path / 'configs/_base_')
    (tmp_path / 'configs/retinanet').mkdir()
    config = 'configs/retinanet/retinanet_kw1x-r50_fpn_1x_coco.py'
    shutil.copy(root / config, tmp_path / config)
    metafile = yaml.safe_load((root / 'configs/retinanet/metafile.yml').read_text())
    metafile['Models'] = [model for model in metafile['Models'] if model['Config'] == config]
    text = yaml.safe_dump(metafile, sort_keys=False, width=100)
    (tmp_path / 'configs/retinanet/metafile.yml').write_text(text)
    (tmp_path / 'docs').mkdir()

    def run(*options):
        monkeypatch.setattr(sys, 'argv', ['model_zoo.py', *options])
        tool.main()

    return tmp_path, run


def test_the_check_notices_what_is_out_of_date(small_zoo, capsys):
    folder, model_zoo = small_zoo
    metafile = folder / 'configs/retinanet/metafile.yml'
    before = metafile.read_text()
    model_zoo()
    assert 'Written: docs/model_zoo.md, model-index.yml.' in capsys.readouterr().out
    assert metafile.read_text() == before
    page = (folder / 'docs/model_zoo.md').read_text()
    assert '[retinanet_kw1x-r50_fpn_1x_coco](../configs/retinanet/' in page
    index = yaml.safe_load((folder / 'model-index.yml').read_text())
    assert index == dict(Import=['configs/retinanet/metafile.yml'])

    config = folder / 'configs/_base_/backbones/kw1x-r50.py'
    config.write_text(config.read_text().replace('cell_num_ratio=1', 'cell_num_ratio=2'))
    with pytest.raises(SystemExit, match='Out of date: configs/retinanet/metafile'):
        model_zoo('--check')


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
