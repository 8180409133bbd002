"""What ``mmengine.hub.get_model`` calls before it builds a model."""


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers all types of mmkw.

    Args:
        init_default_scope: Ignored: configs name the types of mmkw with their scope.

    Example:
        ``mmengine.hub.get_model('mmkw::mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py')``
    """
    from .registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

    for registry in (MODELS, HOOKS, OPTIM_WRAPPER_CONSTRUCTORS):
        registry.import_from_location()
