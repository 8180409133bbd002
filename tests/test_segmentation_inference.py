"""MMSegmentation's own interfaces with a KernelWarehouse segmentor: sizes, modes, refusals."""

import numpy as np
import pytest
import torch
from configs_util import build_model
from mmengine.config import Config

pytest.importorskip('mmseg', reason='infers with a segmentor')

MODES = {
    'whole': dict(mode='whole'),
    'slide': dict(mode='slide', crop_size=(48, 48), stride=(32, 32)),
}


@pytest.fixture(scope='module', params=['KWResNetV1c', 'KWMobileNetV2', 'KWConvNeXt'])
def segmentor(request, root, tmp_path_factory):
    """A config with random weights, and a checkpoint as MMEngine writes it."""
    folder = tmp_path_factory.mktemp('segmentor')
    config = Config.fromfile(root / 'configs/demo/fpn_kw1x-r18_mini-coco-semantic.py')
    channels = [8, 16, 32, 64]
    arguments = dict(depth=18, base_channels=8, stem_channels=8, norm_eval=False)
    if request.param == 'KWMobileNetV2':
        arguments = dict(widen_factor=0.35, out_indices=(0, 2, 4, 6))
        channels = [8, 16, 32, 112]
    if request.param == 'KWConvNeXt':
        arguments = dict(arch=dict(depths=[1, 1, 1, 1], channels=channels))
    config.model.backbone = dict(type=f'mmkw.{request.param}', **arguments)
    config.model.neck.in_channels = channels
    config.dump(folder / 'config.py')
    model = build_model(config)
    meta = dict(dataset_meta=dict(classes=('background', 'digit'), palette=[[0, 0, 0], [9, 9, 9]]))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), folder / 'epoch.pth')
    return folder / 'config.py', folder / 'epoch.pth'


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(97, 131), (33, 61), (128, 128), (250, 35)])
def test_inference_model_takes_any_size(segmentor, mode, size):
    from mmseg.apis import inference_model, init_model

    config, checkpoint = segmentor
    model = init_model(str(config), str(checkpoint), device='cpu')
    model.test_cfg.update(MODES[mode])
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    result = inference_model(model, image)
    assert result.pred_sem_seg.data.shape == (1, *size)
    assert result.seg_logits.data.isfinite().all()


@pytest.mark.parametrize('mode', MODES)
def test_the_inferencer_takes_a_list_of_images(segmentor, mode, tmp_path):
    from mmseg.apis import MMSegInferencer

    config, checkpoint = segmentor
    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    inferencer.show_progress = False
    inferencer.model.test_cfg.update(MODES[mode])
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((53, 71), (90, 41))]
    predictions = inferencer(images, out_dir=str(tmp_path))['predictions']
    assert [p.shape for p in predictions] == [(53, 71), (90, 41)]
    assert len(list(tmp_path.rglob('*.png'))) >= 2


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(1, 120), (120, 1), (3, 3)])
def test_a_strip_is_refused(segmentor, mode, size):
    from mmseg.apis import inference_model, init_model

    config, checkpoint = segmentor
    model = init_model(str(config), str(checkpoint), device='cpu')
    model.test_cfg.update(MODES[mode])
    image = np.zeros((*size, 3), np.uint8)
    with pytest.raises(ValueError, match=r'pixels; a side must have at least \d+\. Resize it, or'):
        inference_model(model, image)


@pytest.mark.parametrize('kind, side', [('KWResNet', 4), ('KWMobileNetV2', 4), ('KWConvNeXt', 32)])
def test_the_smallest_images(kind, side):
    from mmkw import backbones

    arguments = dict(depth=18, base_channels=8) if kind == 'KWResNet' else {}
    network = getattr(backbones, kind)(**arguments)
    network.eval()
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, side, 2 * side))
        assert outputs[-1].shape[2] == 1
        with pytest.raises(ValueError, match=f'{side - 1} x 64 pixels; .* at least {side}'):
            network(torch.randn(1, 3, side - 1, 64))
