"""Turns a built static network into a KernelWarehouse network, in place, by a plan."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from torch import nn

from ..checkpoints import check_checkpoint
from ..layers import (
    DYNAMIC_LAYERS,
    KernelShape,
    PlanError,
    StandsForStatic,
    StaticTwins,
    WarehouseManager,
    kernel_shape,
    leave_static_twins,
    static_twins,
)
from ..layers.attention import Attention
from ..layers.dynamic_layers import DEFAULT_NORM_CFG
from ..layers.static_layers import is_head, read_by_others
from ..ops import modes
from .families import is_of_the_paper
from .freezing import FreezeWithLayers
from .loading import is_converted, run_hooks_always, watch_parents
from .plan import SharingPlan
from .value_projection import SplitProjection, fused_projections, split_projections

_building_static: ContextVar[bool] = ContextVar('building static networks', default=False)


@contextmanager
def static_networks() -> Iterator[None]:
    """Leaves out every conversion: a config builds the static network beside its dynamic one."""
    token = _building_static.set(True)
    try:
        yield
    finally:
        _building_static.reset(token)


def convert(
    network: nn.Module,
    plan: SharingPlan,
    attention_norm_cfg: dict = DEFAULT_NORM_CFG,
    absent: Sequence[KernelShape] = (),
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
) -> nn.Module:
    """Replaces the planned layers of a network by dynamic ones with shared warehouses.

    The network gains a submodule ``warehouse_manager``; every other name stays. It loads state
    dicts of its own and those of the static network (a warm start), and refuses others. Layers that
    do not require gradients (a frozen stage) give frozen attentions; a warehouse is frozen where
    and as long as all its layers are, unless ``freeze_warehouses`` says otherwise. The static
    kernels are dropped, the biases kept. Checked before anything changes, but that a fused
    projection of which the plan names the value is split in two.

    Args:
        network: The static network. Its planned layers must be plain ``torch.nn`` convolutions or
            linear layers, with their own weight.
        plan: Which layer belongs to which warehouse.
        attention_norm_cfg: Norm of the attentions, for ``mmcv.cnn.build_norm_layer``.
        absent: Kernels of planned layers that the network lacks. Their cells stay in the warehouses
            for the others to mix, so that checkpoints of the whole network fit.
        start_tau: The temperature at which a static checkpoint starts the network: 0, or 1 where a
            :class:`~mmkw.engine.hooks.TemperatureHook` anneals it. See
            :func:`~mmkw.layers.warm_start`.
        freeze_warehouses: Whether a warehouse is frozen with its layers. If not, every warehouse
            goes on learning, even where all that mixes its cells is frozen.

    Returns:
        The same network; inside of :func:`static_networks` unchanged.

    Raises:
        ValueError: If ``start_tau`` is neither 0 nor 1.
        PlanError: If the network is a Sequential, if a planned layer is missing or cannot be
            dynamic, if two names are one layer, or if the cells of a warehouse do not come out.
    """
    if _building_static.get():
        return network
    if is_converted(network):
        raise PlanError(f'{type(network).__name__} has a warehouse_manager: it is converted.')
    if isinstance(network, nn.Sequential):
        raise PlanError(
            'The network is a Sequential, which would run its warehouses as a layer. Convert a '
            'module that holds it.'
        )
    watch_parents()
    network._register_load_state_dict_pre_hook(leave_static_twins, with_module=True)
    planned = {layer for layer, _ in plan.layers}
    split_projections(
        network, [name for name in fused_projections(network) if f'{name}.value' in planned]
    )
    kernels = {kernel.layer: kernel for kernel in absent}
    static_layers = _find_layers(network, plan, kernels)
    kernels |= {name: kernel_shape(name, layer) for name, layer in static_layers.items()}
    partitions = plan.partition(kernels)

    manager = WarehouseManager(partitions, start_tau)
    manager.keeps_start = is_of_the_paper(network)
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
        manager.weights[index].data = manager.weights[index].data.to(weights[0])
        if freeze_warehouses:
            manager.weights[index].requires_grad_(any(weight.requires_grad for weight in weights))
        for position, layer in layers.items():
            twins[layer] = DYNAMIC_LAYERS[type(layer)].from_static(
                layer, manager, index, position, attention_norm_cfg
            )
        members.append([twins[layer] for layer in layers.values()])
    # By identity, not by name: a layer that a head uses at several places stays one layer.
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    network.warehouse_manager = manager.train(network.training)
    network._register_load_state_dict_pre_hook(check_checkpoint, with_module=True)
    run_hooks_always(network)
    if freeze_warehouses:
        freeze = FreezeWithLayers(manager, members)
        network.register_forward_pre_hook(freeze)
        if is_head(network):
            # MMSegmentation's heads compute their loss by `forward` itself, past their hooks.
            for layer in twins.values():
                layer.attention.register_forward_pre_hook(freeze)
    if hasattr(network, 'init_weights'):
        network.init_weights = partial(_initialise, network)
    return network


def to_static(network: nn.Module) -> nn.Module:
    """Turns dynamic layers back into static ones, where these compute the same.

    They do at a temperature of 1, where every mixture is the one cell of the one-to-one start. At
    others every image has its own kernel, and no static layer can stand for that.

    Args:
        network: A converted network, a model with some, or one with dynamic layers alone. Changed
            in place: the names of its state dict become those of the static network.

    Returns:
        The same network; of a dynamic layer alone its static twin.

    Raises:
        ValueError: If there is no dynamic layer, or if one has another temperature.

    Example:
        >>> mmkw.set_temperature(network, 1)
        >>> torch.save(mmkw.to_static(network).state_dict(), 'static.pth')
    """
    attentions = {n: m for n, m in network.named_modules() if isinstance(m, Attention)}
    if not attentions:
        raise ValueError(f'{type(network).__name__} has no dynamic layer: it is static.')
    for name, attention in attentions.items():
        if attention.temperature != 1:
            raise ValueError(
                f'{name} has the temperature {attention.temperature:g}: every image has a kernel '
                'of its own, which no static layer has. Only at mmkw.set_temperature(network, 1) '
                'is a network that was trained at 1 static; one that was trained at 0 stays '
                'dynamic.'
            )
    if isinstance(network, StandsForStatic):
        return network.static_twin()
    StaticTwins(network).stay()
    for part in filter(is_converted, list(network.modules())):
        del part.warehouse_manager
        for method in ('init_weights', '_load_from_state_dict'):
            part.__dict__.pop(method, None)
    for module in network.modules():
        modes.remove_pre_hooks(module, (FreezeWithLayers, SplitProjection))
    return network


def _initialise(network: nn.Module) -> None:
    """The network's own ``init_weights``, which sees the static network."""
    with static_twins(network):
        type(network).init_weights(network)


def _find_layers(
    network: nn.Module, plan: SharingPlan, absent: Collection[str]
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    name_of: dict[nn.Module, str] = {}
    read = read_by_others(network)
    for name, warehouse in plan.layers:
        if name in absent:
            continue
        where = f'Warehouse {warehouse!r}, layer {name!r}'
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            raise PlanError(f'{where}: {type(network).__name__} has no such layer.') from None
        if type(layer) not in DYNAMIC_LAYERS or layer._parameters.get('weight') is None:
            kinds = ', '.join(static.__name__ for static in DYNAMIC_LAYERS)
            raise PlanError(
                f'{where} is a {type(layer).__name__}, which has no dynamic twin. Only plain '
                f'{kinds} layers can be planned; leave this one static.'
            )
        if name in read:
            raise PlanError(f'{where} cannot be dynamic: {read[name]} computes with its weight.')
        if layer in name_of:
            raise PlanError(f'{where} is the same module as layer {name_of[layer]!r}.')
        found[name], name_of[layer] = layer, name
    return found
