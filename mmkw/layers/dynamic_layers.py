"""Convolutional and linear layers whose kernel is mixed from a warehouse for every image."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import SampleConv, SampleLinear, apply_mixed, backend, modes
from ..ops.at_once import apply_to_image, learn
from ..ops.averaging import average
from ..ops.kernels import assemble
from .arguments import check_arguments, signature_of
from .attention import Attention
from .integers import integers_of, scales_of
from .partition import (
    KERNELWAREHOUSE,
    METHODS,
    KernelShape,
    LayerShare,
    PlanError,
    WarehouseOptions,
    partition_warehouse,
    split_options,
)
from .static_classes import (
    Kind,
    base_class,
    explicit_padding,
    kind_of,
    own_attributes,
    padding_by_size,
    repeated,
)
from .tracing import Weightless, recorded
from .twins import Kernels, StandsForStatic
from .warehouse import WarehouseManager, fault_of
from .warm_start import warm_start

DEFAULT_NORM_CFG = dict(type='BN1d')
# The dynamic layer of every method for a static class.
_DYNAMIC: dict[tuple[str, Any], type['DynamicLayer']] = {}
# The attributes that a convolution of torch.nn reads at every call.
_READ_AT_EVERY_CALL = ('stride', 'padding', 'dilation', 'groups', 'padding_mode')


class DynamicLayer(Weightless, StandsForStatic):
    """A layer whose kernel is a mixture of kernel cells, one mixture per image.

    The constructor makes a layer that owns its warehouse: ``warehouse_manager.weights[0]`` of shape
    ``(cells, cell_out, cell_in, *cell_kernel)``. ``mmkw.convert`` makes layers that share a
    warehouse. A layer keeps its manager in a tuple, because ``nn.Module`` does not register what is
    in a tuple. So only the network owns a shared warehouse, and copies and pickles of a network
    keep the reference. A state dict with the ``weight`` of the static layer gives a warm start.

    Args:
        *args: The arguments of the static layer in ``torch.nn``, in the same order.
        attention_norm_cfg: Norm of the attention: ``BN1d``, ``SyncBN``, ``LN`` or ``GN``.
        device: As in the static layer.
        **kwargs: More arguments of the static layer, and the warehouse options ``cell_num_ratio``,
            ``cell_inplane_ratio``, ``cell_outplane_ratio``, ``reduction``, ``nonlocal_basis_ratio``
            and ``spatial_partition`` of :class:`~mmkw.layers.WarehouseOptions` (paper, sections 3.1
            to 3.4). ``nonlocal_basis_ratio`` has no effect on a layer with its own warehouse.

    Raises:
        PlanError: If a warehouse option is out of range, if the one-to-one start does not use
            exactly the cells of the budget, or if the layer would be too large.
        ValueError: If an argument of the static layer is out of range.
        TypeError: If an argument of the static layer is missing, unknown, or of a wrong type.
    """

    static_class: type[nn.Module]
    method = KERNELWAREHOUSE
    attention_class: Callable[..., nn.Module] = Attention

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, 'static_class'):
            cls.__signature__ = signature_of(cls.static_class, DEFAULT_NORM_CFG, cls.method)
            _DYNAMIC.setdefault((cls.method, cls.static_class), cls)

    def __init__(
        self,
        *args: Any,
        attention_norm_cfg: dict = DEFAULT_NORM_CFG,
        # torch.nn.utils.skip_init needs an argument of this name.
        device: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        method = METHODS[self.method]
        options, kwargs = split_options(kwargs)
        if 'method' in options:
            # The class is the method, so this is refused as any unknown argument.
            kwargs['method'] = options.pop('method')
        check_arguments(self.static_class, args, kwargs)
        if not method.has_norm and attention_norm_cfg is not DEFAULT_NORM_CFG:
            raise TypeError(
                f'attention_norm_cfg={attention_norm_cfg!r}: the attention of a '
                f'{type(self).__name__} has no norm. Leave it out.'
            )
        dtype = kwargs.pop('dtype', None)
        # torch.nn checks and normalises the arguments. On the meta device this needs no memory.
        static = self.static_class(*args, **kwargs, device='meta')
        partition = partition_warehouse(
            'its own',
            [kernel_shape('layer', static)],
            WarehouseOptions.of(method=self.method, **options),
        )
        self.warehouse_manager = WarehouseManager([partition])
        self._setup(static, self.warehouse_manager, 0, 0, attention_norm_cfg)
        if static.bias is not None:
            self.bias = nn.Parameter(torch.empty(static.bias.shape))
            self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @classmethod
    def from_static(
        cls,
        static: nn.Module,
        manager: WarehouseManager,
        warehouse: int,
        position: int,
        attention_norm_cfg: dict = DEFAULT_NORM_CFG,
    ) -> 'DynamicLayer':
        """Makes the dynamic layer for a static layer, with a kernel from a shared warehouse.

        The dynamic layer takes over the static layer's bias, device, dtype, mode, hooks, and what
        the network has put on it, which also its static twin has. Its attention is frozen if the
        static kernel is frozen. The values of the static kernel are not used.

        Args:
            static: A layer of ``static_class``, or of a class derived from it that
                :func:`~mmkw.layers.static_classes.base_class` recognises.
            manager: Owner of the network's warehouses.
            warehouse: Index of the layer's warehouse.
            position: Index of the layer among the layers of the warehouse.
            attention_norm_cfg: Norm of the attention.

        Raises:
            PlanError: If the layer has an attribute by a private name of the dynamic layer.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._setup(static, manager, warehouse, position, attention_norm_cfg)
        layer.to(static.weight)
        layer.bias = static.bias
        layer.attention.requires_grad_(static.weight.requires_grad)
        modes.hand_hooks_on(static, layer)
        put = own_attributes(static)
        if taken := sorted(put.keys() & vars(layer).keys()):
            raise PlanError(
                f'{layer.share.kernel} has the attribute {taken[0]}, which means something else '
                'in a dynamic layer. Rename it, or leave the layer out.'
            )
        layer.__dict__.update(put, _put=frozenset(put))
        return layer.train(static.training)

    def _setup(
        self,
        static: nn.Module,
        manager: WarehouseManager,
        warehouse: int,
        position: int,
        attention_norm_cfg: dict,
    ) -> None:
        self._take_settings(static)
        self._static_type = type(static)
        self._warehouses = (manager,)
        self._warehouse_index = warehouse
        self._position = position
        partition, share = manager.partitions[warehouse], self.share
        self._grid = share.grid
        self._fan_in = share.kernel.in_channels * math.prod(share.kernel.kernel_size)
        in_channels = share.kernel.in_channels * getattr(static, 'groups', 1)
        self.attention = self.attention_class(
            in_channels, share, partition.num_cells, partition.options, attention_norm_cfg
        )
        self.register_parameter('bias', None)

    def _take_settings(self, static: nn.Module) -> None:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Starts the bias as a static layer does. Cells and attention have their own start."""
        if self.bias is not None:
            bound = 1 / math.sqrt(self._fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def cells(self) -> Tensor:
        """The cells of the layer's warehouse: Tensor[cells, cell_out, cell_in, *cell_kernel]."""
        return self._warehouses[0].weights[self._warehouse_index]

    @property
    def cell_parameters(self) -> list[nn.Parameter]:
        """The parameters behind the cells: the cells, or the parameters that give pruned ones."""
        return self._warehouses[0].weights.parameters_of(self._warehouse_index)

    @property
    def place(self) -> tuple[WarehouseManager, int, int]:
        """The manager, the index of the warehouse, and the layer's position in the warehouse."""
        return self._warehouses[0], self._warehouse_index, self._position

    @property
    def share(self) -> LayerShare:
        """What the layer takes from its warehouse."""
        manager, warehouse, position = self.place
        return manager.partitions[warehouse].layers[position]

    @property
    def learns_kernel(self) -> bool:
        """Whether weights of the attention learn. Who tunes biases and norms freezes kernels."""
        return any(
            parameter is not None and parameter.requires_grad
            for module in self.attention.modules()
            if not isinstance(module, (modes.BATCH_NORM, nn.LayerNorm))
            # By names, since a process may have a part of a weight, which is flat.
            for name, parameter in module._parameters.items()
            if not name.endswith('bias')
        )

    @torch.no_grad()
    def static_kernel(self) -> Tensor:
        """The kernel of the one-to-one start: Tensor[out, in, *kernel_size]."""
        cells, share = self.cells, self.share
        if self.attention.gain is not None:
            return cells.mean(0) / self.attention.gain
        held = [(i, cell) for i, cell in enumerate(share.assigned) if cell is not None]
        rows = cells.new_zeros(1, share.num_mixtures, *cells.shape[1:])
        if held:
            mixtures, assigned = (list(numbers) for numbers in zip(*held))
            rows[0, mixtures] = cells[assigned]
        (kernel,) = assemble(rows, share.grid)
        # Initialisers draw random numbers in memory order, which must be that of a static kernel.
        return kernel.contiguous()

    def static_twin(self) -> nn.Module:
        """Makes the static twin, which shares the bias with this layer."""
        twin = self._make_static()
        # A class derived from that of torch.nn adds no state; see kind_of.
        twin.__class__ = self._static_type
        kernel = twin.weight.detach()
        if not modes.is_sharded(self.cells):
            kernel = self.static_kernel().reshape(kernel.shape)
        twin.weight = nn.Parameter(kernel, self.learns_kernel)
        twin.bias = self.bias
        self.hand_on(twin)
        return twin.train(self.training)

    def _make_static(self) -> nn.Module:
        """Makes a layer of ``static_class`` without bias, on the meta device."""
        raise NotImplementedError

    def counterparts(self, twin: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
        """See :class:`~mmkw.layers.twins.StandsForStatic`."""
        yield twin.weight, self.cell_parameters
        if self.bias is not None:
            yield twin.bias, [self.bias]

    def take_values(self, twin: nn.Module, kernels: Kernels) -> None:
        """See :class:`~mmkw.layers.twins.StandsForStatic`. The twin shares the bias already."""
        self.take_kernel(twin.weight.detach(), twin.weight.requires_grad, kernels)

    def take_kernel(self, kernel: Tensor, learns: bool, kernels: Kernels) -> None:
        """Takes the kernel of a static twin.

        Args:
            kernel: Tensor[out, in, *kernel_size].
            learns: Whether the kernel requires gradients. The attention then does the same.
            kernels: Collects the kernel if it has changed or is loaded.
        """
        if learns != self.learns_kernel:
            self.attention.requires_grad_(learns)
        if kernels.loaded or not torch.equal(kernel, self.static_kernel().view_as(kernel)):
            kernels.add(self, kernel)

    def _map(self, x: Tensor, seen: Tensor) -> Tensor:
        """Applies to every image the kernel that its attention mixes.

        Args:
            x: The images, padded.
            seen: What the attention averages over space.
        """
        y = self._at_once(x, seen)
        return self._mixed(x, self._attend(seen), self.bias) if y is None else y

    def _attend(self, seen: Tensor) -> Any:
        """The attentions of images, from their averages over space."""
        return self.attention(average(seen, self._sample_map.channel_dim))

    def _at_once(self, x: Tensor, seen: Tensor) -> Tensor | None:
        """Computes :meth:`_map` by one call if the layer is known to be as made."""
        # What is observed may have a batch without a length.
        if modes.is_observed() or not x.is_cpu:
            return None
        attention = self.attention
        cells = self._warehouses[0].weights.plain(self._warehouse_index)
        is_as_made = (
            type(attention) is Attention
            and not modes.is_patched(attention)
            and type(self).cells is DynamicLayer.cells
        )
        if not is_as_made or cells is None or modes.is_sharded(cells):
            return None
        mixing = cells, self._grid, self._sample_map, self.bias
        if x.shape[0] == 1 and (operands := attention.operands()) is not None:
            y = apply_to_image(x, seen, operands, *mixing)
            if y is not None:
                return y
        learning = attention.learning(seen, seen.shape[self._sample_map.channel_dim])
        return None if learning is None else learn(x, seen, learning, *mixing)

    def _mixed(
        self, x: Tensor, attention: Tensor, bias: Tensor | None, taps: Tensor | None = None
    ) -> Tensor:
        """Applies the kernels that attentions mix from the cells; see :func:`apply_mixed`."""
        stored = integers_of(self._warehouses[0].weights, self._warehouse_index)
        if stored is not None and backend.mixes_integers(
            *stored, self._grid, x, attention, bias, taps
        ):
            cells, magnitudes = stored
            attention = attention.float() * scales_of(magnitudes).flatten()
        else:
            cells = self.cells
        if modes.is_sharded(cells) and not modes.is_sharded(attention):
            raise RuntimeError(
                f'The kernel cells of a {type(self).__name__} are sharded where it computes. With '
                'FSDP or fully_shard wrap the module that has warehouse_manager with all its '
                'layers, not warehouse_manager or what is in it.'
            )
        return apply_mixed(x, attention, cells, self._grid, self._sample_map, bias, taps)

    def take_names(self, state_dict: dict[str, Any], prefix: str, cells: str) -> None:
        """Translates names in which others have published the layer.

        Args:
            state_dict: Changed in place.
            prefix: The layer's place in the state dict.
            cells: The name of its warehouse there.
        """

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Takes a static kernel if the layer owns its warehouse."""
        manager, own_manager = self._warehouses[0], self._modules.get('warehouse_manager')
        own = f'{prefix}warehouse_manager.weights.0'
        if manager is own_manager:
            self.take_names(state_dict, prefix, own)
        plain = f'{prefix}weight' in state_dict or (manager is own_manager and own in state_dict)
        if plain and integers_of(manager.weights, self._warehouse_index):
            raise RuntimeError(
                f'{prefix or "the layer"} stores its cells as integers, and the state dict has '
                'others. Load it before mmkw.quantize_cells.'
            )
        kernel = state_dict.pop(f'{prefix}weight', None)
        if kernel is not None:
            if manager is not own_manager:
                raise RuntimeError(
                    f'{prefix}weight is a static kernel for a layer that shares its warehouse. '
                    'Load static weights into the network that has the warehouse_manager.'
                )
            partition = manager.partitions[0]
            (share,) = partition.layers
            if fault := fault_of(kernel, self.cells, getattr(kernel, 'shape', None)):
                raise RuntimeError(f'{prefix}weight, a static kernel, {fault}.')
            if share.kernel.fits(kernel.shape):
                name = share.kernel.layer
                cells, _ = warm_start(
                    partition, {name: kernel}, {name: self.attention}, self.cells, manager.start_tau
                )
                state_dict[own] = cells
                self.attention.take_start(manager.start_tau, state_dict, f'{prefix}attention.')
            else:
                # As a static layer does: MMEngine loads the rest, torch raises at the end.
                args[-1].append(
                    f'{prefix}weight is a static kernel of {tuple(kernel.shape)}; this layer has '
                    f'kernels of {share.kernel.shape}.'
                )
        fault = None
        if 'warehouse_manager' in self._modules and own in state_dict:
            fault = fault_of(state_dict[own], self.cells)
        if fault:
            raise RuntimeError(f'{own}, kernel cells, {fault}.')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The arguments, as for the static layer."""
        return self.static_class.extra_repr(self)


class ConvNd(DynamicLayer):
    """A dynamic convolution of any number of dimensions."""

    # mmcv's ConvModule reads this attribute.
    transposed = False

    def _take_settings(self, static: nn.Module) -> None:
        self.in_channels = static.in_channels
        self.out_channels = static.out_channels
        self.kernel_size = static.kernel_size
        self.stride = static.stride
        self.padding = static.padding
        self.output_padding = static.output_padding
        self.dilation = static.dilation
        self.groups = static.groups
        self.padding_mode = static.padding_mode
        kind = kind_of(type(static))  # type: ignore[arg-type]
        self._pads_by_size = kind is Kind.PADS_BY_SIZE
        self._padding_before = modes.padding_before(static)
        self._settle()

    def __setattr__(self, name: str, value: Any) -> None:
        """Networks change the stride or the dilation of their layers after they are made."""
        super().__setattr__(name, value)
        if name in _READ_AT_EVERY_CALL and '_sample_map' in self.__dict__:
            self._settle()

    def _settle(self) -> None:
        """Prepares the computation that stride, padding, dilation and groups ask for."""
        # F.pad pads before the convolution where the convolution itself cannot. The last dimension
        # comes first.
        zeros = self.padding_mode == 'zeros'
        self._explicit_padding = explicit_padding(self) if zeros else self._padding_before
        begins, ends = self._explicit_padding[::2], self._explicit_padding[1::2]
        uneven = self._pads_by_size or begins != ends
        self._pads_first = uneven or not zeros
        dims = len(self.kernel_size)
        padding = (0,) * dims if self._pads_first else tuple(reversed(begins))
        stride, dilation = repeated(self.stride, dims), repeated(self.dilation, dims)
        self._sample_map = SampleConv(stride, padding, dilation, self.groups)

    def _make_static(self) -> nn.Module:
        twin = self.static_class(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            False,
            self.padding_mode,
            device='meta',
        )
        modes.pad_before(twin, self._padding_before)
        return twin

    def forward(self, input: Tensor) -> Tensor:
        """Maps Tensor[batch, in_channels, *size] to Tensor[batch, out_channels, *output_size].

        An input without the batch dimension is one image.
        """
        x = input
        if modes.is_symbolic(x):
            return recorded(self, x)
        dims, shape = len(self.kernel_size), x.shape
        if len(shape) == dims + 1:
            # Not by a call: hooks have run, or will.
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if len(shape) != dims + 2 or shape[1] != self.in_channels:
            raise ValueError(
                f'{type(self).__name__} expects an input of shape (batch, {self.in_channels}, '
                f'{dims} spatial sizes) or the same without batch, got {tuple(shape)}.'
            )
        if 0 in shape[2:]:
            raise ValueError(
                f'{type(self).__name__} expects an input with pixels, got {tuple(shape)}.'
            )
        seen = x
        if self._pads_first:
            mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
            x = F.pad(x, self._padding_for(x), mode=mode)
        return self._map(x, seen)

    def _padding_for(self, x: Tensor) -> list[int]:
        if not self._pads_by_size:
            return self._explicit_padding
        conv = self._sample_map
        return padding_by_size(x.shape[2:], self.kernel_size, conv.stride, conv.dilation)


class KWConv1d(ConvNd):
    """Dynamic ``torch.nn.Conv1d``: Tensor[batch, channels, length]; see :class:`DynamicLayer`.

    Example:
        >>> layer = mmkw.KWConv1d(16, 32, 3, padding=1)
        >>> tuple(layer(torch.rand(2, 16, 50)).shape)
        (2, 32, 50)
    """

    static_class = nn.Conv1d


class KWConv2d(ConvNd):
    """Dynamic ``torch.nn.Conv2d``: Tensor[batch, channels, height, width].

    Modules that build their convolutions through mmcv take it as
    ``conv_cfg=dict(type='mmkw.KWConv2d', ...)``. See :class:`DynamicLayer`.

    Example:
        >>> layer = mmkw.KWConv2d(16, 32, 3, padding=1, cell_num_ratio=2)
        >>> tuple(layer(torch.rand(2, 16, 10, 10)).shape)
        (2, 32, 10, 10)
        >>> tower = mmcv.cnn.ConvModule(16, 32, 3, conv_cfg=dict(type='mmkw.KWConv2d'))
    """

    static_class = nn.Conv2d


class KWConv3d(ConvNd):
    """Dynamic ``torch.nn.Conv3d``: ``Tensor[batch, channels, *size]``; see :class:`DynamicLayer`.

    Example:
        >>> layer = mmkw.KWConv3d(16, 32, 3, padding=1)
        >>> tuple(layer(torch.rand(2, 16, 4, 6, 6)).shape)
        (2, 32, 4, 6, 6)
    """

    static_class = nn.Conv3d


class KWLinear(DynamicLayer):
    """Dynamic ``torch.nn.Linear``: Tensor[batch, ..., in_features]; see :class:`DynamicLayer`.

    The first dimension counts the images. The attention averages over the dimensions between the
    first and the last one. A single vector is one image.

    Example:
        >>> layer = mmkw.KWLinear(16, 32, cell_num_ratio=4)
        >>> tuple(layer(torch.rand(2, 7, 16)).shape)
        (2, 7, 32)
    """

    static_class = nn.Linear

    def _take_settings(self, static: nn.Module) -> None:
        self.in_features = static.in_features
        self.out_features = static.out_features
        self._sample_map = SampleLinear()

    def _make_static(self) -> nn.Module:
        return self.static_class(self.in_features, self.out_features, False, device='meta')

    def forward(self, input: Tensor) -> Tensor:
        """Maps Tensor[batch, ..., in_features] to Tensor[batch, ..., out_features].

        An input Tensor[in_features] is one image.
        """
        x = input
        if modes.is_symbolic(x):
            return recorded(self, x)
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f'KWLinear expects an input of shape (batch, ..., {self.in_features}), '
                f'got {tuple(x.shape)}.'
            )
        if x.shape[0] and 0 in x.shape[1:-1]:
            # There is no token to average over. What learns gets gradients of zeros.
            learning = [x, self.cells, *self.attention.parameters(), self.bias]
            zero = sum(tensor.flatten()[:0].sum() for tensor in learning if tensor is not None)
            return zero + x.new_zeros(*x.shape[:-1], self.out_features)
        return self._map(x, x)


def dynamic_class(layer: nn.Module, method: str = KERNELWAREHOUSE) -> type[DynamicLayer] | None:
    """The class of the dynamic layer that can replace a static layer.

    Args:
        layer: Any module.
        method: As in :class:`~mmkw.layers.WarehouseOptions`.

    Returns:
        None if no dynamic layer can; see :func:`~mmkw.layers.static_classes.base_class`. Nor can it
        where the network has put something on the layer that has another meaning in a dynamic one.
    """
    kind = _DYNAMIC.get((method, base_class(layer)))
    if kind is None:
        return None
    own = own_attributes(layer)
    return None if 'attention' in own or any(hasattr(kind, name) for name in own) else kind


def has_own_warehouse(module: nn.Module) -> bool:
    """Whether a module is a dynamic layer that shares its warehouse with no other.

    Args:
        module: Any module.
    """
    return isinstance(module, DynamicLayer) and module.place[0] is module._modules.get(
        'warehouse_manager'
    )


def kernel_shape(name: str, static: nn.Module) -> KernelShape:
    """Reads the shape of a static layer's kernel. A linear layer is a convolution of size one."""
    out_channels, in_channels, *kernel_size = static.weight.shape
    return KernelShape(name, out_channels, in_channels, tuple(kernel_size) or (1,))
