"""Thin detectors and a segmentor, static or dynamic. They have few layers, as each takes time."""

from mmengine import ConfigDict
from twin_networks import thin_backbone, thin_retinanet

PREPROCESSOR = dict(mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True)


def _resnet(dynamic):
    return thin_backbone('mmkw.KWResNet' if dynamic else 'mmkw.ResNet')


def retinanet(dynamic):
    config = thin_retinanet('mmkw.KWResNet' if dynamic else 'mmkw.ResNet')
    config.test_cfg.update(nms=dict(type='nms', iou_threshold=0.6), nms_pre=50)
    return _detector(config)


def _detector(config):
    config.data_preprocessor = dict(type='DetDataPreprocessor', pad_size_divisor=32, **PREPROCESSOR)
    return ConfigDict(config)


def rtmdet(dynamic):
    """With a backbone through the wrapper."""
    backbone = _resnet(False)
    if dynamic:
        backbone = dict(type='mmkw.KWModule', module=backbone)
    return _detector(
        ConfigDict(
            type='RTMDet',
            backbone=backbone,
            neck=dict(type='FPN', in_channels=[8], out_channels=8, num_outs=2),
            bbox_head=dict(
                type='RTMDetSepBNHead',
                num_classes=3,
                in_channels=8,
                stacked_convs=1,
                feat_channels=8,
                exp_on_reg=True,
                share_conv=True,
                pred_kernel_size=1,
                with_objectness=False,
                norm_cfg=dict(type='BN'),
                anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[4, 8]),
                bbox_coder=dict(type='DistancePointBBoxCoder'),
            ),
            test_cfg=dict(
                nms_pre=50,
                min_bbox_size=0,
                score_thr=0.0,
                max_per_img=5,
                nms=dict(type='nms', iou_threshold=0.6),
            ),
        )
    )


def mask_rcnn(dynamic):
    regions = dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=2),
        out_channels=8,
        featmap_strides=[4],
    )
    nms = dict(type='nms', iou_threshold=0.7)
    return _detector(
        ConfigDict(
            type='MaskRCNN',
            train_cfg=None,
            backbone=_resnet(dynamic),
            neck=dict(type='FPN', in_channels=[8], out_channels=8, num_outs=2),
            rpn_head=dict(
                type='RPNHead',
                in_channels=8,
                feat_channels=8,
                anchor_generator=dict(
                    type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8]
                ),
            ),
            roi_head=dict(
                type='StandardRoIHead',
                bbox_roi_extractor=regions,
                bbox_head=dict(
                    type='Shared2FCBBoxHead',
                    in_channels=8,
                    fc_out_channels=16,
                    roi_feat_size=3,
                    num_classes=3,
                ),
                mask_roi_extractor=regions,
                mask_head=dict(
                    type='FCNMaskHead',
                    num_convs=1,
                    in_channels=8,
                    conv_out_channels=8,
                    num_classes=3,
                ),
            ),
            test_cfg=dict(
                rpn=dict(nms_pre=20, max_per_img=10, nms=nms, min_bbox_size=0),
                rcnn=dict(score_thr=0.0, nms=nms, max_per_img=5, mask_thr_binary=0.5),
            ),
        )
    )


def segmentor(dynamic):
    return ConfigDict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', **PREPROCESSOR),
        backbone=_resnet(dynamic),
        decode_head=dict(
            type='FCNHead',
            in_channels=8,
            in_index=0,
            channels=8,
            num_convs=1,
            num_classes=4,
            concat_input=False,
        ),
        test_cfg=dict(mode='whole'),
    )


DETECTORS = dict(retinanet=retinanet, rtmdet=rtmdet, mask_rcnn=mask_rcnn)
