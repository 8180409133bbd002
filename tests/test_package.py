"""What the package carries, and that MMEngine finds it: in new processes that import no mmkw."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from command_util import run

import mmkw
from mmkw.engine.names import MIM, config_path, model_of

NAME = 'mask-rcnn_kw1x-r50_fpn_adamw-1x_coco'
PATH = f'mask_rcnn/{NAME}.py'
needs_mmdet = pytest.mark.skipif(
    importlib.util.find_spec('mmdet') is None,
    reason='the configs are for mmdet',
)


@pytest.fixture(scope='module')
def contents(root, tmp_path_factory):
    """Files of the wheel, which is built from a source distribution, without kernels."""
    pytest.importorskip('setuptools')
    folder = tmp_path_factory.mktemp('dist')
    shutil.copytree(
        root,
        folder / 'source',
        symlinks=True,
        ignore=shutil.ignore_patterns(
            '.*', '__pycache__', 'build', '*.so', 'data', 'work_dirs', 'tests', 'docs', '*.egg-info'
        ),
    )
    shutil.copytree(root / 'mmkw/.mim', folder / 'source/mmkw/.mim', symlinks=True)
    for where, hook in (('source', 'sdist'), ('made', 'wheel')):
        code = (
            'import sys\n'
            # As in a build that is isolated: there is no torch.
            'sys.modules["torch"] = None\n'
            f'from setuptools.build_meta import build_{hook} as build\n'
            'build(sys.argv[1])'
        )
        result = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code, str(folder)],
            cwd=folder / where,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        if hook == 'sdist':
            (archive,) = folder.glob('*.tar.gz')
            shutil.unpack_archive(archive, folder, filter='data')
            (folder / f'mmkw-{mmkw.__version__}').rename(folder / 'made')
    (wheel,) = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_carries_configs_tools_and_the_index(root, contents):
    tracked = [
        path.relative_to(root).as_posix()
        for folder in ('configs', 'tools')
        for path in (root / folder).rglob('*')
        if path.is_file() and path.suffix != '.pyc'
    ]
    for_clones = {'tools/demo.py', 'tools/setup_env.sh', 'tools/check_install.sh'}
    expected = {f'mmkw/.mim/{name}' for name in {*tracked, 'model-index.yml'} - for_clones}
    assert {name for name in contents if '.mim/' in name} == expected
    for name in ('model-index.yml', f'configs/{PATH}', 'tools/train.py'):
        assert contents[f'mmkw/.mim/{name}'] == (root / name).read_bytes()


def test_the_wheel_carries_the_package_and_its_metadata(root, contents):
    for path in (root / 'mmkw').rglob('*'):
        name = path.relative_to(root).as_posix()
        if path.suffix in ('.py', '.typed', '.cpp', '.h') and '.mim' not in name:
            assert name in contents
    info = f'mmkw-{mmkw.__version__}.dist-info'
    entry_points = contents[f'{info}/entry_points.txt'].decode()
    assert 'mmkw = mmkw.cli:main' in entry_points
    assert 'mmkw = mmkw.autoload:install' in entry_points
    told = contents[f'{info}/METADATA'].decode()
    assert 'Apache-2.0' in told
    needed = [line for line in told.splitlines() if line.startswith('Requires-Dist')]
    plain = {line.split()[1].partition('<')[0] for line in needed if 'extra ==' not in line}
    assert plain == {'torch'}
    licenses = [text for name, text in contents.items() if name.endswith('LICENSE')]
    assert licenses == [(root / 'LICENSE').read_bytes()]
    # Without torch no kernels: the wheel is for every platform.
    assert not any(name.endswith('.so') for name in contents)
    assert b'Tag: py3-none-any' in contents[f'{info}/WHEEL']


def test_the_version_is_told_once_more_where_it_must(root):
    citation = yaml.safe_load((root / 'CITATION.cff').read_text())
    assert citation['version'] == mmkw.__version__


def python(tmp_path, code):
    """Runs code where nothing but the package itself could be found."""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': os.fspath(MIM.parents[1])},
    )
    assert result.returncode == 0, result.stderr
    return result


NAMES = """
import sys
from mmengine.hub import get_config, get_model
from mmengine.config import Config
name = 'mmkw::demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
whole = get_config(name)
open('based.py', 'w').write(f'_base_ = {name!r}')
based = Config.fromfile('based.py')
assert based.model == whole.model and based.train_dataloader == whole.train_dataloader
model = get_model(name)
assert 'mmkw.cli' not in sys.modules
from mmkw import is_converted
print(type(model).__name__, whole.default_scope, is_converted(model.backbone))
print(get_config('mmkw::PATH', pretrained=True).model_path)

from mmkw.engine.building import build_model
for library, base, change in (
    ('mmdet', 'retinanet/retinanet_r50_fpn_1x_coco.py', ''),
    ('mmseg', 'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', 'pretrained=None,'),
):
    open('other.py', 'w').write(
        f"_base_ = ['{library}::{base}', 'mmkw::_base_/backbones/kw4x-r50.py']\\n"
        f'model = dict({change} backbone=_base_.backbone)'
    )
    backbone = build_model(Config.fromfile('other.py'), on_meta=True).backbone
    print(type(backbone).__module__, sum(p.numel() for p in backbone.parameters()))

import numpy as np
from mmdet.apis import DetInferencer
from mmseg.apis import MMSegInferencer
image = np.zeros((64, 64, 3), np.uint8)
det = DetInferencer('RTMDet_tiny_kw1x-cspnext_8xb32-300e_coco', device='cpu')
print(*det(image)['predictions'][0], is_converted(det.model.backbone))
print(det.list_models('mmkw', '.*yolox'))
seg = MMSegInferencer('segmenter_kw1x-vit-t_mask_8xb1-160k_ade20k-512x512', device='cpu')
print(seg(image)['predictions'].shape, is_converted(seg.model.backbone))
for name in ('rtmdet_tiny_8xb32-300e_coco', 'nothing'):
    try:
        print(det._load_model_from_metafile(name)[0].model.backbone.type)
    except ValueError as error:
        print(error)
""".replace('PATH', PATH)


@pytest.mark.slow
@needs_mmdet
def test_configs_and_models_by_name(tmp_path):
    """MMEngine's, MMDetection's and MMSegmentation's own look-ups, dynamic and static names."""
    pytest.importorskip('mmseg', reason='some of the configs are for it')
    result = python(tmp_path, NAMES)
    # Progress, and what OneDL's libraries do without.
    others = ('Inference', 'Could not import')
    lines = [line for line in result.stdout.splitlines() if not any(o in line for o in others)]
    told = [line for line in lines if ' - WARNING - ' in line and 'weights=FILE' in line]
    assert [line.split(' - WARNING - ')[1] for line in told] == [
        f'{name}, weights: none are published; train this config. Give the inferencer '
        'weights=FILE; without, the network is random.'
        for name in (
            'rtmdet_tiny_kw1x-cspnext_8xb32-300e_coco',
            'segmenter_kw1x-vit-t_mask_8xb1-160k_ade20k-512x512',
        )
    ]
    assert [line for line in lines if ' - mmengine - ' not in line and line.strip()] == [
        'MaskRCNN mmdet True',
        'Mask R-CNN with KernelWarehouse 1x ResNet50 at github.com/OSVAI/KernelWarehouse/',
        'mmdet.models.backbones.resnet 99966144',
        'mmseg.models.backbones.resnet 99966144',
        'labels scores bboxes True',
        "['yolox_tiny_kw2x-cspdarknet_8xb8-300e_coco']",
        '(64, 64) True',
        'CSPNeXt',
        'Cannot find model: nothing in mmdet',
    ]


def test_names_that_do_not_exist_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no config 'mask_rcnn/r50.py', but .*{NAME[:9]}"):
        config_path('mask_rcnn/r50.py')
    assert model_of('nothing') is None


@needs_mmdet
def test_a_package_is_looked_up_once_for_its_bases(monkeypatch):
    from mmengine.config import Config, config

    asked = []
    monkeypatch.setattr(
        config, 'is_installed', lambda package: asked.append(package) or len(asked) > 1
    )
    name = 'mmdet::_base_/models/retinanet_r50_fpn.py'
    with pytest.raises(ModuleNotFoundError, match='mmdet is not installed'):
        Config._get_cfg_path(name, 'my_config.py')
    first = Config._get_cfg_path(name, 'my_config.py')
    assert first == Config._get_cfg_path(name, 'other_config.py') and first[1] == 'mmdet'
    assert asked == ['mmdet', 'mmdet']
    assert Config._get_cfg_path('base.py', 'folder/my_config.py') == ('folder/base.py', None)


def test_every_model_of_the_index_is_found_with_words_about_its_weights(root):
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    names = []
    for metafile in index['Import']:
        for model in yaml.safe_load((root / metafile).read_text())['Models']:
            names.append(model['Name'])
            assert (MIM / model['Config']).is_file()
            # mim download takes these for addresses: one, of a file without a name.
            assert model['Weights'].endswith('/') and ',' not in model['Weights']
            if 'Published Weights' in model:
                assert 'github.com/OSVAI/KernelWarehouse' in model['Weights']
    assert len(set(names)) == len(names) > 30


def test_the_command(root):
    command = [sys.executable, '-m', 'mmkw']
    assert run(root, *command, '--version')[1] == f'mmkw {mmkw.__version__}\n'
    result, output = run(root, *command, 'train')
    assert result.returncode == 2 and "invalid choice: 'train'" in output
    result, output = run(root, *command)
    assert result.returncode == 2 and 'the following arguments are required' in output


@pytest.mark.parametrize('package', ['torch', 'mmengine'])
def test_the_command_without_packages(tmp_path, package):
    code = f"""
import sys
sys.modules[{package!r}] = None
from mmkw.cli import main
main(['info'])
try:
    main(['plan', 'config.py'])
except SystemExit as end:
    assert end.code == 2
    print('refused', file=sys.stderr)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.startswith('mmkw '), result.stderr
    assert f'mmkw plan needs {package}, which is not installed. Run: pip install' in result.stderr
    assert result.stderr.endswith('refused\n') and 'Traceback' not in result.stderr


def test_folders_are_attributes_of_the_package():
    """As the documentation uses them, after ``import mmkw`` alone."""
    names = 'deploy.export ops.use_compiled layers.Attention checkpoints.read_checkpoint'
    code = f"import mmkw; [print(eval('mmkw.' + name)) for name in {names.split()}]"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count('<') == 4, result.stderr
