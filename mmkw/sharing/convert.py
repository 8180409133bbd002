"""Converts a static network into a KernelWarehouse network, in place, by a plan."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn

from ..checkpoints import check_checkpoint
from ..checkpoints.static_kernels import told
from ..layers import (
    KernelShape,
    PlanError,
    StandsForStatic,
    StaticTwins,
    WarehouseManager,
    dynamic_class,
    kernel_shape,
    leave_static_twins,
    static_twins,
)
from ..layers.attention import LayerAttention
from ..layers.partition import KERNELWAREHOUSE, METHODS, is_comparator
from ..layers.static_classes import STATIC_CLASSES
from ..layers.static_layers import is_head, used_by_others
from ..layers.twins import Kernels, has_values
from ..ops import modes
from .families import family_rule, is_of_the_paper
from .freezing import HOOKS, FreezeBeforeMixing, FreezeWithLayers
from .loading import is_converted, run_hooks_always
from .plan import SharingPlan
from .rules import absent_kernels
from .value_projection import SplitProjection, fused_projections, split_projections

LOGGER = logging.getLogger('mmkw')

_building_static: ContextVar[bool] = ContextVar('building static networks', default=False)


@contextmanager
def static_networks() -> Iterator[None]:
    """Switches conversion off, so that a config of a dynamic network builds the static network."""
    token = _building_static.set(True)
    try:
        yield
    finally:
        _building_static.reset(token)


def convert(
    network: nn.Module,
    plan: SharingPlan | None = None,
    attention_norm_cfg: dict | None = None,
    absent: Sequence[KernelShape] = (),
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    keep_weights: bool = True,
    **options: Any,
) -> nn.Module:
    """Replaces layers of a network by dynamic ones with shared warehouses.

    The network gains a submodule ``warehouse_manager``; all other modules keep their names. The
    network computes what it computed before: exactly if the budget is 1 or more, else as nearly as
    its cells can. It loads its own state dicts and those of the static network (a warm start), and
    refuses others.

    A layer that does not require gradients (in a frozen stage, for example) gets a frozen
    attention. A warehouse is frozen while all its layers are frozen, unless ``freeze_warehouses``
    is false.

    The plan is checked before layers are replaced. Only fused projections are split before that,
    if the plan names their value projection.

    Args:
        network: The static network, of any library. Its planned layers must be convolutions or
            linear layers of ``torch.nn``, or compute the same, with their own weight.
        plan: Which layer belongs to which warehouse. By default the rule of the network's family
            decides; see :func:`~mmkw.sharing.family_rule`.
        attention_norm_cfg: Norm of the attentions: ``BN1d``, ``SyncBN``, ``LN`` or ``GN``. By
            default SyncBN or BatchNorm if the network has it, else LayerNorm.
        absent: Kernels of planned layers that the network lacks, or that stay static. Their cells
            stay in the warehouses, and the other layers mix them. So checkpoints of the whole
            network fit. Without ``plan`` the rule of the family knows them.
        start_tau: The temperature at which a static checkpoint starts the network: 0, or 1 with a
            :class:`~mmkw.engine.hooks.TemperatureHook`. See :func:`~mmkw.layers.warm_start`.
        freeze_warehouses: Whether a warehouse is frozen while all its layers are frozen. If not,
            every warehouse learns, even if all its layers are frozen.
        keep_weights: Whether the kernels of the network start the dynamic layers. If not, cells and
            attentions have the random start of the paper, for training from scratch.
        **options: Without ``plan``: the fields of :class:`~mmkw.layers.WarehouseOptions`, such as
            ``cell_num_ratio``, each one value or a sequence with one value per warehouse. With
            ``method='dyconv'``, ``'condconv'`` or ``'odconv'`` the layers become those of another
            method, each with its own kernels.

    Returns:
        The same network. Inside :func:`static_networks` it is unchanged.

    Example:
        >>> class Network(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = torch.nn.Conv2d(64, 64, 3), torch.nn.Conv2d(64, 64, 3)
        ...
        ...     def forward(self, x):
        ...         return self.second(self.first(x).relu())
        >>> static, x = Network(), torch.rand(2, 64, 9, 9)
        >>> network = mmkw.convert(copy.deepcopy(static), cell_num_ratio=2)
        >>> torch.allclose(network(x), static(x), atol=1e-5)
        True
        >>> plan = mmkw.SharingPlan.make([('first', 'all'), ('second', 'all')], cell_num_ratio=2)
        >>> mmkw.convert(static, plan)(x).shape
        torch.Size([2, 64, 5, 5])
        >>> type(mmkw.convert(Network(), method='odconv', cell_num_ratio=4).first).__name__
        'ODConv2d'

    Raises:
        ValueError: If ``start_tau`` is neither 0 nor 1, or ``attention_norm_cfg`` no norm.
        TypeError: If ``network`` is no module, if ``plan`` or ``absent`` is of another type, if
            there are options beside a plan or ``absent`` without one, or if ``freeze_warehouses``
            or ``keep_weights`` is neither True nor False.
        PlanError: If the network is a layer, a Sequential, or converted already, or has a
            ``warehouse_manager`` of its own, if a planned layer is missing or cannot be dynamic, if
            two names are one layer, or if the options of a warehouse do not fit its kernels.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f'network must be a torch.nn.Module, got {network!r}.')
    for name, value in (('freeze_warehouses', freeze_warehouses), ('keep_weights', keep_weights)):
        if not isinstance(value, bool):
            raise TypeError(f'{name} must be True or False, got {value!r}.')
    if _building_static.get():
        return network
    if is_converted(network):
        raise PlanError(f'{type(network).__name__} has a warehouse_manager: it is converted.')
    if hasattr(network, 'warehouse_manager'):
        raise PlanError(
            f'{type(network).__name__} has an attribute warehouse_manager of its own, where its '
            'warehouses would be. Rename it.'
        )
    if isinstance(network, STATIC_CLASSES):
        raise PlanError(
            f'The network is itself a layer, a {type(network).__name__}. Make a dynamic layer, '
            'such as mmkw.KWConv2d, or convert a module that holds it.'
        )
    if isinstance(network, nn.Sequential) or type(network) in (nn.ModuleList, nn.ModuleDict):
        raise PlanError(
            f'The network is a {type(network).__name__}, which would count its warehouses among '
            'its modules. Convert a module that holds it.'
        )
    if isinstance(getattr(network, '_orig_mod', None), nn.Module):
        raise PlanError('The network is compiled. Convert it first, then call torch.compile.')
    are_kernels = isinstance(absent, Sequence) and all(isinstance(k, KernelShape) for k in absent)
    if not are_kernels or (absent and plan is None):
        raise TypeError(
            f'absent must be the KernelShapes of planned layers, beside a plan, got {absent!r}. '
            "Without a plan the rule of the network's family knows them."
        )
    if plan is None:
        method = options.get('method', KERNELWAREHOUSE)
        plan = SharingPlan.make(family_rule(network, method), **options)
        absent = () if is_comparator(method) else absent_kernels(network)
    elif not isinstance(plan, SharingPlan) or options:
        raise TypeError(
            f'convert takes a SharingPlan or warehouse options, not both, got plan={plan!r} and '
            f'options {sorted(options)}. Give the options to SharingPlan.make.'
        )
    kernels = {kernel.layer: kernel for kernel in absent}
    methods = {options.method for options in plan.options.values()}
    if attention_norm_cfg is not None and not any(METHODS[name].has_norm for name in methods):
        raise PlanError(
            f'attention_norm_cfg={attention_norm_cfg!r} does not apply to '
            f'method={min(methods)!r}, whose attentions have no norm. Leave it out.'
        )
    planned = {layer for layer, _ in plan.layers} - set(kernels)
    split_projections(
        network, [name for name in fused_projections(network) if f'{name}.value' in planned]
    )
    static_layers = _find_layers(network, plan, kernels)
    kernels |= {name: kernel_shape(name, layer) for name, layer in static_layers.items()}
    partitions = plan.partition(kernels)

    manager = WarehouseManager(partitions, start_tau)
    manager.keeps_start = is_of_the_paper(network) and not keep_weights
    norm_cfg = attention_norm(network) if attention_norm_cfg is None else attention_norm_cfg
    twins: dict[nn.Module, nn.Module] = {}
    members: list[list[nn.Module]] = []
    for index, partition in enumerate(partitions):
        layers = {
            position: static_layers[share.kernel.layer]
            for position, share in enumerate(partition.layers)
            if share.kernel.layer in static_layers
        }
        if not layers:
            raise PlanError(f'All layers of warehouse {partition.name!r} are absent.')
        weights = [layer.weight for layer in layers.values()]
        if len({(weight.dtype, weight.device) for weight in weights}) > 1:
            kinds = sorted({f'{weight.dtype} on {weight.device}' for weight in weights})
            raise PlanError(
                f'Warehouse {partition.name!r} has layers of {" and of ".join(kinds)}, which '
                'cannot share cells. Plan one warehouse for each.'
            )
        manager.weights[index] = nn.Parameter(manager.weights[index].detach().to(weights[0]))
        if freeze_warehouses:
            manager.weights[index].requires_grad_(any(weight.requires_grad for weight in weights))
        for position, layer in layers.items():
            kind: Any = dynamic_class(layer, partition.options.method)
            twins[layer] = kind.from_static(layer, manager, index, position, norm_cfg)
        members.append([twins[layer] for layer in layers.values()])
    # Layers are found by identity: a layer that a head uses at several places stays one layer.
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    network.warehouse_manager = manager.train(network.training)
    network._register_load_state_dict_pre_hook(leave_static_twins, with_module=True)
    network._register_load_state_dict_pre_hook(check_checkpoint, with_module=True)
    run_hooks_always(network)
    if freeze_warehouses:
        freeze = FreezeWithLayers(manager, members)
        network.register_forward_pre_hook(freeze)
        manager.follow_layers = freeze.follow
        if is_head(network) or hasattr(network, 'forward_features'):
            # MMSegmentation's heads compute their loss by `forward` itself, and users of timm's
            # networks call their methods, both past the network's hooks.
            for index, own in enumerate(members):
                for layer in own:
                    hook = FreezeBeforeMixing(freeze, index)
                    layer.attention.register_forward_pre_hook(hook)
    if hasattr(network, 'init_weights'):
        network.init_weights = partial(_initialise, network)
    if keep_weights:
        _keep_weights(network, twins, manager)
    return network


def _keep_weights(
    network: nn.Module, twins: Mapping[nn.Module, Any], manager: WarehouseManager
) -> None:
    """Starts dynamic layers with the kernels of the static layers that they replace."""
    kernels = Kernels(loaded=True)
    for static, dynamic in twins.items():
        if not static.weight.is_meta:
            kernels.add(dynamic, static.weight)
    if errors := kernels.lay_into_warehouses():
        text = told(len(twins), errors, manager.start_tau)
        LOGGER.info(f'{type(network).__name__}: its own weights, {text}')


def attention_norm(network: nn.Module) -> dict:
    """Chooses the norm of the attentions by the norms of a network.

    Args:
        network: A static network.

    Returns:
        ``SyncBN`` if the network has it, else ``BN1d`` if it has any BatchNorm, else ``LN``.
    """
    norms = [module for module in network.modules() if isinstance(module, modes.BATCH_NORM)]
    if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
        return dict(type='SyncBN')
    return dict(type='BN1d' if norms else 'LN')


def to_static(network: nn.Module) -> nn.Module:
    """Turns dynamic layers back into static layers that compute the same.

    This is possible at temperature 1 only. There every mixture is the one cell of the one-to-one
    start. At other temperatures every image has its own kernel.

    Args:
        network: A converted network, or a model that contains converted networks or dynamic layers.
            It is changed in place: the names of its state dict become those of the static network.

    Returns:
        The same network. If ``network`` is a dynamic layer, its static twin.

    Raises:
        ValueError: If there is no dynamic layer, or if a layer has a temperature other than 1, or
            no values in this process.

    Example:
        >>> network = mmkw.KWResNet(18, base_channels=8)
        >>> mmkw.set_temperature(network, 1)
        >>> 'layer1.0.conv1.weight' in mmkw.to_static(network).state_dict()
        True
    """
    attentions = {n: m for n, m in network.named_modules() if isinstance(m, LayerAttention)}
    if not attentions:
        raise ValueError(f'{type(network).__name__} has no dynamic layer: it is static.')
    for name, attention in attentions.items():
        if not attention.is_static_at_one:
            raise ValueError(
                f'{name} is a {type(attention).__name__}, of a method that gives every image its '
                'own kernel at any temperature. mmkw.deploy.to_static approximates.'
            )
        if attention.temperature != 1:
            raise ValueError(
                f'{name} has the temperature {attention.temperature:g}: every image has a kernel '
                'of its own, which no static layer has. Only at mmkw.set_temperature(network, 1) '
                'is a network that was trained at 1 static; one that was trained at 0 stays '
                'dynamic.'
            )
    for name, module in network.named_modules():
        if isinstance(module, StandsForStatic) and not has_values(module):
            raise ValueError(
                f'{name or type(network).__name__} has no values in this process: it is on the '
                'meta device, or its cells are sharded. Load or gather them first.'
            )
    return leave_warehouses(network)


def leave_warehouses(network: nn.Module) -> nn.Module:
    """Replaces all dynamic modules by their static twins, and removes what :func:`convert` added.

    Args:
        network: As in :func:`to_static`, at any temperature. Its dynamic layers may already be
            replaced by static ones; fused projections are then fused again.

    Returns:
        The same network. If ``network`` is a dynamic layer, its static twin.
    """
    if isinstance(network, StandsForStatic):
        return network.static_twin()
    StaticTwins(network).stay()
    for part in filter(is_converted, list(network.modules())):
        del part.warehouse_manager
        for method in ('init_weights', '_load_from_state_dict'):
            part.__dict__.pop(method, None)
    for module in network.modules():
        modes.remove_pre_hooks(module, (*HOOKS, SplitProjection))
    return network


def _initialise(network: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Runs the network's own ``init_weights`` on the static twins."""
    with static_twins(network):
        type(network).init_weights(network, *args, **kwargs)


def _find_layers(
    network: nn.Module, plan: SharingPlan, absent: Collection[str]
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    name_of: dict[nn.Module, str] = {}
    used = used_by_others(network)
    for name, warehouse in plan.layers:
        if name in absent:
            continue
        where = f'Warehouse {warehouse!r}, layer {name!r}'
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            raise PlanError(f'{where}: {type(network).__name__} has no such layer.') from None
        method = plan.options[warehouse].method
        if dynamic_class(layer) and dynamic_class(layer, method) is None:
            raise PlanError(
                f'{where} is a {type(layer).__name__}, for which method={method!r} has no layer: '
                'only for Conv2d. Leave it static, or plan it by another method.'
            )
        if dynamic_class(layer) is None:
            kinds = ', '.join(static.__name__ for static in STATIC_CLASSES)
            raise PlanError(
                f'{where} is a {type(layer).__name__}, which has no dynamic twin. Only plain '
                f'{kinds} layers can be planned; leave this one static.'
            )
        if name in used:
            raise PlanError(f'{where} cannot be dynamic: {used[name]}.')
        if layer in name_of:
            raise PlanError(f'{where} is the same module as layer {name_of[layer]!r}.')
        found[name], name_of[layer] = layer, name
    return found
