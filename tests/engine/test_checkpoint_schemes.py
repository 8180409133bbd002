"""Every door that a checkpoint comes in by: hostile files are refused, whole ones loaded."""

import functools
import http.server
import json
import subprocess
import sys
import threading
import types

import hostile
import mmengine.runner.checkpoint
import pytest
import torch
from command_util import run
from interruptions import make_runner
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmkw import KWConv2d
from mmkw.checkpoints import DamagedCheckpointError, UnsafeCheckpointError
from mmkw.engine.files import schemes

DEMO = 'configs/demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
# Kinds of payloads that stand for the others, which the reader's own tests send through it.
KINDS = ['a call', 'a statistic under a new name', 'a history as a door']

REFUSED = (UnsafeCheckpointError, DamagedCheckpointError)


def test_every_scheme_of_mmengine_is_ours():
    """One that MMEngine adds is not closed: this test says so."""
    code = (
        'from mmengine.runner import CheckpointLoader; import json;'
        'print(json.dumps({k: v.__module__ for k, v in CheckpointLoader._schemes.items()}))'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'},
    )
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout.splitlines()[-1])
    assert set(theirs.values()) == {'mmengine.runner.checkpoint'}
    ours = {pattern: loader.__module__ for pattern, loader in CheckpointLoader._schemes.items()}
    assert ours == dict.fromkeys(theirs, schemes.__name__)
    named = [name for name in vars(mmengine.runner.checkpoint) if name.startswith('load_from_')]
    for name in named:
        assert getattr(mmengine.runner.checkpoint, name).__module__ == schemes.__name__, name


@pytest.fixture
def files(tmp_path):
    """Three hostile files; and a whole one, of a dynamic layer and its static twin."""
    made = tmp_path / 'made'
    payloads = hostile.payloads(made)
    folder = tmp_path / 'files'
    folder.mkdir()
    for index, kind in enumerate(KINDS):
        hostile.zip_file(folder / f'hostile{index}.pth', hostile.inside(payloads[kind]))
    torch.save(dict(state_dict=networks().state_dict()), folder / 'whole.pth')
    before = hostile.namespaces()
    yield folder
    assert not made.exists() and not hostile.altered(before)


def networks():
    torch.manual_seed(1)
    return nn.ModuleDict(dict(dynamic=KWConv2d(4, 4, 3), static=nn.Conv2d(4, 4, 3)))


def assert_closed(address):
    """An address refuses hostile files and loads a whole one, into both kinds of networks."""
    for index in range(len(KINDS)):
        with pytest.raises(REFUSED, match=f'hostile{index}'):
            load_checkpoint(networks(), address.format(f'hostile{index}'))
    got = networks()
    for parameter in got.parameters():
        nn.init.zeros_(parameter)
    load_checkpoint(got, address.format('whole'), strict=True)
    expected = networks().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in got.state_dict().items())


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """A server of the files, and an empty folder for downloads."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=files)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_local_files(files):
    assert_closed(f'{files}/{{}}.pth')


def test_addresses_of_the_web(server, tmp_path):
    assert_closed(f'{server}/{{}}.pth')
    # Downloaded once, into torch.hub's folder.
    assert (tmp_path / 'hub/checkpoints/whole.pth').exists()
    (tmp_path / 'hub/checkpoints/whole.pth').write_bytes(b'PK')
    with pytest.raises(
        DamagedCheckpointError, match=r'hub/checkpoints/whole\.pth \(of http.* damaged'
    ):
        load_checkpoint(networks(), f'{server}/whole.pth?download=1')


def test_models_of_torchvision(server, monkeypatch):
    """MMEngine's own look-up, in a stand-in for the package, which needs CUDA's torch here."""
    names = ['whole', *(f'hostile{index}' for index in range(len(KINDS)))]

    class Weights(list):
        def __init__(self, name):
            url = f'{server}/{name}.pth'
            super().__init__([types.SimpleNamespace(name='DEFAULT', url=url)])
            self.DEFAULT, self.__name__ = self[0], f'{name}_Weights'

    models = types.SimpleNamespace(
        list_models=lambda _: names, get_model_weights=lambda name: Weights(name)
    )
    package = types.SimpleNamespace(__version__='0.20.0', models=models)
    monkeypatch.setitem(sys.modules, 'torchvision', package)
    for scheme in ('torchvision', 'modelzoo'):
        assert_closed(scheme + '://{}.default')
    with pytest.raises(KeyError, match='MMEngine knows no such model'):
        load_checkpoint(networks(), 'torchvision://nowhere')


@pytest.mark.parametrize('error', [ModuleNotFoundError, RuntimeError])
def test_models_of_torchvision_without_it(server, monkeypatch, error):
    """It is not installed, or built for another torch: MMEngine has the plain names, too."""

    def missing():
        raise error('torchvision::nms')

    monkeypatch.setattr(schemes.mmengine_checkpoint, 'get_torchvision_models', missing)
    assert schemes.mmengine.load(schemes.TORCHVISION_URLS)['resnet50'].endswith('-0676ba61.pth')
    names = ['whole', *(f'hostile{index}' for index in range(len(KINDS)))]
    urls = {name: f'{server}/{name}.pth' for name in names}
    monkeypatch.setattr(schemes.mmengine, 'load', lambda _: urls)
    assert_closed('torchvision://{}')
    with pytest.raises(ImportError, match=r'torchvision is needed for this name.*torchvision::nms'):
        load_checkpoint(networks(), 'torchvision://whole.imagenet1k_v2')


def test_models_of_openmmlab(server, files, tmp_path, monkeypatch):
    """From the list of the user's own folder, addresses and files."""
    home = tmp_path / 'home'
    home.mkdir()
    monkeypatch.setenv('MMENGINE_HOME', str(home))
    names = ['whole', *(f'hostile{index}' for index in range(len(KINDS)))]
    web = {f'web/{name}': f'{server}/{name}.pth' for name in names}
    local = {f'local/{name}': f'../files/{name}.pth' for name in names}
    (home / 'open_mmlab.json').write_text(json.dumps({**web, **local}))
    for scheme in ('open-mmlab', 'openmmlab'):
        for kind in ('web', 'local'):
            assert_closed(f'{scheme}://{kind}/{{}}')


def test_models_of_mmclassification(files, tmp_path, monkeypatch):
    """Only the backbone is taken; from the folder of downloads, for want of a network."""
    from mmengine.runner.checkpoint import get_mmcls_models

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    folder = tmp_path / 'hub/checkpoints'
    folder.mkdir(parents=True)
    name, url = next(iter(get_mmcls_models().items()))
    cached = folder / url.rpartition('/')[2]
    state = {f'backbone.{key}': value for key, value in networks().state_dict().items()}
    torch.save(dict(state_dict={**state, 'head.fc.weight': torch.ones(1)}), cached)
    assert set(CheckpointLoader.load_checkpoint(f'mmcls://{name}')['state_dict']) == set(
        networks().state_dict()
    )
    cached.write_bytes((files / 'hostile0.pth').read_bytes())
    with pytest.raises(UnsafeCheckpointError):
        CheckpointLoader.load_checkpoint(f'mmcls://{name}')


def test_objects_of_a_store(files, monkeypatch):
    """MMEngine's Petrel backend, over a stand-in for its client."""

    class Client:
        def __init__(self, *_, **__):
            pass

        def get(self, path, **_):
            return (files / path.rpartition('/')[2]).read_bytes()

        Get = get

    package = types.ModuleType('petrel_client')
    package.client = types.ModuleType('petrel_client.client')
    package.client.Client = Client
    monkeypatch.setitem(sys.modules, 'petrel_client', package)
    monkeypatch.setitem(sys.modules, 'petrel_client.client', package.client)
    for scheme in ('s3', 'petrel', 'cluster:s3'):
        assert_closed(scheme + '://bucket/{}.pth')


def test_models_of_pavi(files, monkeypatch):
    class Model:
        def __init__(self, name):
            # A name that leads out of the folder is no path.
            self.name = f'../../{name}'

        def download(self, path):
            with open(path, 'wb') as file:
                file.write((files / self.name.rpartition('/')[2]).read_bytes())

    with pytest.raises(ImportError, match='needs the package pavi'):
        load_checkpoint(networks(), 'pavi://whole.pth')
    package = types.ModuleType('pavi')
    package.modelcloud = types.SimpleNamespace(get=Model)
    monkeypatch.setitem(sys.modules, 'pavi', package)
    assert_closed('pavi://{}.pth')


@pytest.mark.parametrize('kind', ['mmkw.KWResNet', 'mmdet.ResNet'])
def test_weights_of_a_config(files, kind):
    pytest.importorskip('mmdet', reason="builds MMDetection's ResNet")
    init_default_scope('mmdet')
    for index in range(len(KINDS)):
        weights = dict(type='Pretrained', checkpoint=f'{files}/hostile{index}.pth')
        backbone = MODELS.build(dict(type=kind, depth=18, base_channels=8, init_cfg=weights))
        with pytest.raises(REFUSED):
            backbone.init_weights()


@pytest.mark.parametrize('dynamic', [True, False])
@pytest.mark.parametrize('resume', [True, False])
def test_a_runner(files, tmp_path, dynamic, resume):
    for index in range(len(KINDS)):
        runner = make_runner(tmp_path / 'run', dynamic)
        runner._load_from, runner._resume = f'{files}/hostile{index}.pth', resume
        with pytest.raises(REFUSED):
            runner.train()


@pytest.mark.parametrize('dynamic', [True, False])
def test_the_text_of_a_config_is_not_run(tmp_path, dynamic):
    """``Runner.resume`` runs ``meta.config``."""
    make_runner(tmp_path / 'run', dynamic, epochs=1).train()
    path = tmp_path / 'run/epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    code = f'import os\nos.mkdir({str(tmp_path / "made")!r})\nmodel = dict()\n'
    checkpoint['meta'].update(config=code, cfg=code)
    checkpoint['message_hub']['runtime_info']['cfg'] = code
    torch.save(checkpoint, path)
    make_runner(tmp_path / 'run', dynamic, epochs=2).train()
    assert not (tmp_path / 'made').exists() and (tmp_path / 'run/epoch_2.pth').exists()


@pytest.fixture
def detector(root):
    pytest.importorskip('mmdet', reason="runs MMDetection's inferencer")
    config = Config.fromfile(root / DEMO)
    config.merge_from_dict(
        {'model.backbone.base_channels': 8, 'model.neck.in_channels': [8, 16, 32]}
    )
    return config


def test_an_inferencer(files, tmp_path, detector):
    from mmdet.apis import DetInferencer, init_detector

    for index in range(len(KINDS)):
        path = f'{files}/hostile{index}.pth'
        for load in (
            lambda path=path: init_detector(detector, path, device='cpu'),
            lambda path=path: DetInferencer(detector, weights=path, device='cpu'),
            lambda path=path: DetInferencer(weights=path, device='cpu', scope='mmdet'),
        ):
            with pytest.raises(REFUSED):
                load()
    # A config that would run when it is read, and one that would when its model is built.
    model = f'model = dict(type="os.mkdir", path={str(tmp_path / "made")!r})'
    for code in (f'import os\nos.mkdir({str(tmp_path / "made")!r})\n', model):
        meta = dict(cfg=code)
        hub = dict(runtime_info=dict(cfg=code))
        torch.save(dict(meta=meta, message_hub=hub, state_dict={}), tmp_path / 'config.pth')
        with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
            DetInferencer(weights=str(tmp_path / 'config.pth'), device='cpu', scope='mmdet')


def test_the_tools(root, files, tmp_path):
    """As commands: their messages name the file, without a traceback where they check first."""
    out = tmp_path / 'out.pth'
    path = files / 'hostile0.pth'
    for options in ([], ['--config', DEMO]):
        command = [sys.executable, '-m', 'mmkw', 'convert', path, out, *options]
        result, output = run(root, *command)
        assert result.returncode == 2 and 'hostile0.pth holds pickled objects' in output, output
        assert 'Traceback' not in output and not out.exists()
    result, output = run(
        root, sys.executable, 'tools/test.py', DEMO, path, '--work-dir', tmp_path / 'work'
    )
    assert result.returncode != 0 and not (tmp_path / 'made').exists()
