"""The contrasting-driven attention function (paper, section 3.4) and its temperature."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attending, backend, modes
from ..ops.at_once import Operands
from .partition import (
    MOST_CELLS,
    LayerShare,
    PlanError,
    WarehouseOptions,
    check_size,
    is_number,
)

MIN_WIDTH = 16
DENOMINATOR_EPS = 1e-3
# The norms that the kernels compute, if they are of no class derived from one.
_PLAIN_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm)


class LayerAttention(nn.Module):
    """What gives every image the weights of a layer's cells, by any method.

    Attributes:
        in_channels: Channels of the layer's input.
        temperature: tau, in [0, 1]. 0 unless a schedule sets it. State dicts note it beside the
            version of the module, so that no tensor is added.
        has_begun: Whether the temperature is that of a warm start, and no schedule has set it yet.
        is_static_at_one: Whether all images get the same kernel at a temperature of 1.
        gain: The cells of a comparator relative to the kernel that they start at; None if the cells
            start one to one.
    """

    is_static_at_one = False
    gain: float | None = None
    in_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 0.0
        self.has_begun = False

    def reset_parameters(self) -> None:
        """Sets linear layers by Kaiming normal (fan_out, relu), and biases to zero."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def start_anew(self) -> None:
        """Gives all parts the random start that they have when they are made."""
        # Each before what holds it, which has its own way to start its layers.
        for part in reversed(list(self.modules())):
            if hasattr(part, 'reset_parameters'):
                part.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'LayerAttention':
        """Starts what had no values before: a static checkpoint does not give all of them."""
        had_none = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(fn, recurse)
        if had_none and not any(parameter.is_meta for parameter in self.parameters()):
            self.start_anew()
        return self

    def begin(self, tau: float) -> None:
        """Begins a warm start, once the cells are laid.

        Args:
            tau: The temperature of the start.
        """
        self.temperature = tau
        self.has_begun = True

    def end_start(self) -> None:
        """Ends a warm start, where trained attentions take its place."""
        if self.has_begun:
            self.temperature = 0.0
            self.has_begun = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Also notes the temperature beside the version: no name is added."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, '_metadata', None):
            metadata[prefix[:-1]]['temperature'] = float(self.temperature)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        """Also takes the temperature at which the state dict was saved."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        tau = local_metadata.get('temperature')
        if isinstance(tau, float) and 0 <= tau <= 1:
            self.temperature = tau
            self.has_begun = False

    def take_start(self, tau: float, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Keeps a warm start while the rest of a static network is loaded.

        Args:
            tau: The temperature of the start.
            state_dict: The state dict of the static network. The attention adds its own tensors.
            prefix: The attention's place in the state dict.
        """
        self.begin(tau)
        for name, tensor in self.state_dict().items():
            state_dict[f'{prefix}{name}'] = tensor


class Attention(LayerAttention):
    """Gives every image the weights with which a layer mixes the cells of its warehouse.

    ``z`` are the logits of a mixture over the ``n`` cells and one zero cell. The attention is
    ``alpha = (1 - tau) a + tau beta`` with ``a = z / (sum |z| + 1e-3)``. ``beta`` is 1 for the cell
    of the one-to-one start and 0 for all others. ``alpha`` may be negative. With a non-local basis
    (paper, appendix) the logits of other layers' cells are computed from a few basis values.

    In a batch of one image each channel has one value, which has no variance. So a BatchNorm
    normalises a batch of one or none by its running statistics, and does not change them. One image
    is refused if the running statistics are estimated anew and no batch has been seen yet. A SyncBN
    that joins several processes, and every larger batch, works as in ``torch.nn``.

    Args:
        in_channels: Channels of the layer's input.
        share: The layer's share in the warehouse.
        num_cells: Cells of the warehouse.
        options: Options of the warehouse.
        norm_cfg: Config of the norm over the hidden units, in the words of mmcv: its ``type``,
            ``BN1d`` or ``SyncBN`` (then fc1 has no bias), ``LN`` or ``GN``, and its arguments.

    Raises:
        PlanError: If the attention would have too many parameters.
        ValueError: If ``norm_cfg`` is not the config of a norm for vectors.
    """

    is_static_at_one = True

    def __init__(
        self,
        in_channels: int,
        share: LayerShare,
        num_cells: int,
        options: WarehouseOptions,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_mixtures = share.num_mixtures
        self.num_cells = num_cells
        self.start = share.start
        self.local_cells = num_cells

        width = attention_width(in_channels, options)
        check_width(width, share, options)
        check_size(
            f'The attention of {share.kernel}, of {width} hidden units for {self.num_mixtures} '
            f'mixtures of {num_cells} cells,',
            width * max(in_channels, self.num_mixtures * (num_cells + 1)),
            f'Lower cell_num_ratio={options.cell_num_ratio} or reduction={options.reduction}',
        )
        norm = norm_of(norm_cfg, width)
        self.fc1 = nn.Linear(in_channels, width, bias=not isinstance(norm, modes.BATCH_NORM))
        self.norm1 = norm
        self.relu = nn.ReLU()
        # A warehouse of one layer has only the layer's own cells, so it needs no basis.
        nonlocal_cells = num_cells - int(options.cell_num_ratio * share.num_mixtures)
        if options.nonlocal_basis_ratio < 1 and nonlocal_cells > 0:
            self.local_cells = num_cells - nonlocal_cells
            basis = max(int(nonlocal_cells * options.nonlocal_basis_ratio), MIN_WIDTH)
            self.fc2 = nn.Linear(
                width, self.num_mixtures * (self.local_cells + basis + 1), bias=False
            )
            self.fc3 = nn.Linear(basis, nonlocal_cells, bias=False)
            self.basis_bias = nn.Parameter(torch.empty(self.num_mixtures * (num_cells + 1)))
        else:
            self.fc2 = nn.Linear(width, self.num_mixtures * (num_cells + 1))

        # Not saved, since the plan determines these numbers. num_cells stands for the zero cell.
        self._assigned = [num_cells if cell is None else cell for cell in share.assigned]
        self._assigned_there: Tensor | None = None
        self.reset_parameters()

    @property
    def has_nonlocal_basis(self) -> bool:
        """Whether the logits of other layers' cells come from a basis."""
        return self.local_cells < self.num_cells

    def reset_parameters(self) -> None:
        """See :class:`LayerAttention`."""
        super().reset_parameters()
        if self.has_nonlocal_basis:
            nn.init.zeros_(self.basis_bias)

    @property
    def start_scale(self) -> float:
        """The expected sum of the magnitudes of a mixture's logits at the random start.

        :meth:`start_at` uses the same scale. The scale of the logits decides how far one step of
        the optimizer moves the attention.
        """
        width = self.fc1.out_features
        return 0.8 * math.sqrt(width * (self.num_cells + 1) / self.num_mixtures)

    @property
    def reach(self) -> float:
        """The largest sum of the magnitudes of a mixture's attentions in :meth:`start_at`.

        It is below 1 for two reasons: the denominator has a constant, and the zero cell gets a part
        of the same size. A zero cell with a logit of exactly zero would have no gradient.
        """
        return 1 - 2 * DENOMINATOR_EPS / self.start_scale

    @torch.no_grad()
    def start_at(self, alpha: Tensor) -> None:
        """Sets the parameters so that every image gets these attentions at tau = 0.

        The weights of the last layer become zero, and its biases become the logits. The other
        layers keep their random start: when the last layer changes, images get different kernels.

        Args:
            alpha: Tensor[mixtures, cells]. The magnitudes of a row add up to at most :attr:`reach`.
        """
        scale, alpha = self.start_scale, alpha.double()
        zero_cell = scale * (1 - alpha.abs().sum(1, keepdim=True)) - DENOMINATOR_EPS
        logits = torch.cat([scale * alpha, zero_cell], 1).flatten()
        self.fc2.weight.zero_()
        (self.basis_bias if self.has_nonlocal_basis else self.fc2.bias).copy_(logits)

    def forward(self, pooled: Tensor) -> Tensor:
        """Computes the attentions in the precision of the parameters, also under autocast.

        Args:
            pooled: Tensor[batch, in_channels], the average of the layer's input over space.

        Returns:
            Tensor[batch, mixtures, cells], without the zero cell.
        """
        quick = self._by_kernels(pooled)
        if quick is not None:
            return quick
        with modes.without_autocast(pooled):
            hidden = self.relu(normalised(self.norm1, self.fc1(as_precise(pooled, self.fc1))))
            logits = self._logits(hidden)
            alpha = logits / (logits.abs().sum(-1, keepdim=True) + DENOMINATOR_EPS)
            if self.temperature > 0:
                # Exact at both ends. At tau = 1 every parameter stays in the graph, which
                # DistributedDataParallel needs. A number in lerp would be compiled anew for every
                # temperature.
                assigned = torch.tensor(self._assigned, device=alpha.device)
                beta = F.one_hot(assigned, self.num_cells + 1).to(alpha)
                alpha = (1 - self.temperature) * alpha + self.temperature * beta
            return alpha[..., :-1]

    def _as_made(self) -> tuple[Any, attending.Parameters] | None:
        """The norm and the parameters; None if a layer is replaced, parametrised or hooked."""
        # Where torch.nn keeps them: a small layer takes hardly longer than its attributes.
        get = self._modules.get
        layers = fc1, norm, relu, fc2 = get('fc1'), get('norm1'), get('relu'), get('fc2')
        if (
            self.has_nonlocal_basis
            or not (type(fc1) is type(fc2) is nn.Linear and type(relu) is nn.ReLU)
            or type(norm) not in _PLAIN_NORMS
            or modes.is_patched(*layers)
        ):
            return None
        first, scale, last = fc1._parameters, norm._parameters, fc2._parameters
        parameters = attending.Parameters(
            first.get('weight'),
            first.get('bias'),
            scale.get('weight'),
            scale.get('bias'),
            last.get('weight'),
            last.get('bias'),
        )
        is_as_made = (
            'bias' in first
            and parameters.fc1_weight is not None
            and parameters.norm_weight is not None
            and parameters.norm_bias is not None
            and parameters.fc2_weight is not None
            and parameters.fc2_bias is not None
        )
        return (norm, parameters) if is_as_made else None

    def _by_kernels(self, pooled: Tensor) -> Tensor | None:
        """Computes :meth:`forward` by kernels of our own, or returns None where they cannot.

        A few kernels are faster than many small operators.
        """
        # Whoever looks at the operators sees PyTorch's, and no question about sizes and versions.
        made = None if modes.is_observed() else self._as_made()
        if made is None:
            return None
        if not pooled.is_cuda:
            operands = self._operands(*made)
            if operands is not None and backend.computes_constants(pooled, *operands.tensors):
                return torch.ops.mmkw.attend(pooled, *operands.tensors, *operands.numbers)
        learning = self._learning(*made, pooled, pooled.shape[-1])
        if learning is None or pooled.dim() != 2:
            return None
        kernels = backend.attention_kernels(pooled, self.num_cells, *learning.parameters)
        return None if kernels is None else attending.attend(kernels, pooled, learning)

    def learning(self, seen: Tensor, channels: int) -> attending.Learning | None:
        """What the compiled operators learn from, on the CPU.

        Args:
            seen: The images.
            channels: Their channels.

        Returns:
            None where these cannot: for parameters that are not dense or not of float32, a norm
            that is none of theirs, or where a layer has been changed. None, too, if neither the
            images nor a parameter needs a gradient.
        """
        made = self._as_made() if torch.is_grad_enabled() else None
        if made is None or not (
            seen.requires_grad or any(p is not None and p.requires_grad for p in made[1])
        ):
            return None
        learning = self._learning(*made, seen, channels)
        # The images are averaged to float32, whatever they are.
        if learning is None or not backend.attention_kernels(
            learning.parameters.fc2_bias, self.num_cells, *learning.parameters
        ):
            return None
        return learning

    def _learning(
        self, norm: Any, parameters: attending.Parameters, seen: Tensor, channels: int
    ) -> attending.Learning | None:
        # What is wrong with the sizes of these PyTorch says.
        if channels != parameters.fc1_weight.shape[1] or norm.eps <= 0:
            return None
        description = self._description(norm, seen)
        if description is None:
            return None
        start = attending.Start(self.temperature, self._assigned_on(seen.device))
        return attending.Learning(parameters, description, start, DENOMINATOR_EPS)

    @staticmethod
    def _description(norm: Any, seen: Tensor) -> attending.Norm | None:
        """What the kernels take of the norm, or None if they do not take it."""
        if isinstance(norm, nn.LayerNorm):
            return attending.Norm('layer', norm.eps)
        statistics = norm._buffers
        mean, var = statistics['running_mean'], statistics['running_var']
        batches = statistics['num_batches_tracked']
        if mean is None or var is None:
            return None
        # A batch of one has no variance; see normalised.
        kind = 'batch' if norm.training and seen.shape[0] > 1 else 'running'
        if norm.training and (
            norm.momentum is None or not norm.track_running_stats or _joins_processes(norm)
        ):
            return None
        if batches is not None and (
            batches.dtype != torch.int64 or batches.numel() != 1 or batches.is_inference()
        ):
            return None
        for statistic in (mean, var):
            if (
                statistic.dtype != torch.float32
                or not statistic.is_contiguous()
                or statistic.requires_grad
                or statistic.is_inference()
                or statistic.device != seen.device
                or not modes.is_plain(statistic)
            ):
                return None
        return attending.Norm(kind, norm.eps, norm.momentum or 0.0, mean, var, batches)

    def _assigned_on(self, device: torch.device) -> Tensor:
        """The cells of the one-to-one start, copied to a device once: a copy waits for the GPU."""
        if self._assigned_there is None or self._assigned_there.device != device:
            self._assigned_there = torch.tensor(self._assigned, device=device)
        return self._assigned_there

    def operands(self) -> Operands | None:
        """What the compiled operators compute the attentions of constants from.

        Returns:
            None where they cannot: with a temperature, with a norm by the batch, or where a layer
            has been changed.
        """
        made = self._as_made()
        return None if made is None else self._operands(*made)

    def _operands(self, norm: Any, parameters: attending.Parameters) -> Operands | None:
        if self.temperature > 0:
            return None
        mean = variance = None
        if isinstance(norm, modes.BATCH_NORM):
            mean, variance = norm._buffers['running_mean'], norm._buffers['running_var']
            if norm.training or mean is None:
                return None
        elif not isinstance(norm, nn.LayerNorm):
            return None
        fc1_weight, fc1_bias, *rest = parameters
        return Operands(
            (fc1_weight, fc1_bias, mean, variance, *rest),
            (self.num_mixtures, norm.eps, DENOMINATOR_EPS),
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """Computes the logits: Tensor[batch, mixtures, cells + 1]."""
        z = self.fc2(hidden).unflatten(1, (self.num_mixtures, -1))
        if not self.has_nonlocal_basis:
            return z
        local, basis, zero = z.split([self.local_cells, z.shape[-1] - self.local_cells - 1, 1], -1)
        others = self.fc3(basis)
        logits = torch.cat([others[..., : self.start], local, others[..., self.start :], zero], -1)
        return logits + self.basis_bias.view(self.num_mixtures, -1)

    def extra_repr(self) -> str:
        """The numbers of mixtures and cells."""
        return f'mixtures={self.num_mixtures}, cells={self.num_cells}'


def attention_width(in_channels: int, options: WarehouseOptions) -> int:
    """The hidden units of an attention.

    Args:
        in_channels: Channels of the layer's input.
        options: Options of the warehouse.
    """
    return max(int(in_channels * options.reduction), MIN_WIDTH)


def check_width(width: int, share: LayerShare, options: WarehouseOptions) -> None:
    """Refuses an attention with too many hidden units.

    Args:
        width: The hidden units.
        share: The layer's share in the warehouse.
        options: Options of the warehouse.

    Raises:
        PlanError: If there are more than :data:`~mmkw.layers.partition.MOST_CELLS`.
    """
    if width > MOST_CELLS:
        raise PlanError(
            f'The attention of {share.kernel} would have {width} hidden units, more than '
            f'{MOST_CELLS}. Lower reduction={options.reduction}.'
        )


# The norms for vectors by the names of mmcv, each with its argument for the length of a vector.
_NORMS = dict(
    BN1d=(nn.BatchNorm1d, 'num_features'),
    SyncBN=(nn.SyncBatchNorm, 'num_features'),
    LN=(nn.LayerNorm, 'normalized_shape'),
    GN=(nn.GroupNorm, 'num_channels'),
)


def norm_of(norm_cfg: dict, width: int) -> nn.Module:
    """Builds the norm of the hidden units.

    Args:
        norm_cfg: Config of the norm, as in :class:`Attention`.
        width: The hidden units.

    Raises:
        ValueError: If ``norm_cfg`` is not the config of a norm for vectors.
    """
    expected = "attention_norm_cfg must be such as dict(type='BN1d'), 'SyncBN' or 'LN'"
    if not isinstance(norm_cfg, dict) or norm_cfg.get('type') not in _NORMS:
        raise ValueError(f'{expected}, got {norm_cfg!r}; known are {", ".join(_NORMS)}.')
    arguments = {name: value for name, value in norm_cfg.items() if name != 'type'}
    learns = arguments.pop('requires_grad', True)
    eps, momentum = arguments.get('eps', 1e-5), arguments.get('momentum')
    if not isinstance(learns, bool):
        raise ValueError(f'{expected}, got {norm_cfg!r}: requires_grad must be True or False.')
    if not is_number(eps) or not 0 < eps < math.inf:
        raise ValueError(f'{expected}, got {norm_cfg!r}: eps must be a number above 0.')
    if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
        raise ValueError(f'{expected}, got {norm_cfg!r}: momentum must be a number in [0, 1].')
    make, features = _NORMS[norm_cfg['type']]
    try:
        norm = make(**{features: width}, **arguments)
    except Exception as error:
        raise ValueError(f'{expected}, got {norm_cfg!r}: {error}') from error
    norm.requires_grad_(learns)
    if isinstance(norm, modes.BATCH_NORM) and norm.running_mean is None:
        raise ValueError(
            f'{expected}, got {norm_cfg!r}: without running statistics there is nothing to '
            'normalise a batch of one image by.'
        )
    return norm


def as_precise(pooled: Tensor, first: nn.Module) -> Tensor:
    """Casts the input of an attention to the precision of its first layer.

    Args:
        pooled: Tensor[batch, in_channels].
        first: The layer. If it has been replaced by one without ``weight``, nothing is cast.
    """
    weight = getattr(first, 'weight', None)
    return pooled.to(weight.dtype) if isinstance(weight, Tensor) else pooled


def normalised(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Normalises the hidden units of an attention; see :class:`Attention` about a batch of one.

    Args:
        norm: The norm.
        hidden: Tensor[batch, units].

    Raises:
        ValueError: If the running statistics of a BatchNorm are estimated anew, and the first batch
            has one image.
    """
    alone = hidden.shape[0] <= 1 and not _joins_processes(norm)
    if isinstance(norm, modes.BATCH_NORM) and norm.training and alone:
        if norm.momentum is None and hidden.shape[0] and not norm.num_batches_tracked:
            raise ValueError(
                'The running statistics of an attention are estimated anew (BatchNorm with '
                'momentum=None and num_batches_tracked=0, as by update_bn), and the first '
                'batch has one image: one value per channel has no variance. Take batches '
                "of two or more, or attention_norm_cfg=dict(type='LN')."
            )
        for hook in modes.computing_hooks(norm):
            hook(norm, ())
        return F.batch_norm(
            hidden,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            eps=norm.eps,
        )
    return norm(hidden)


def _joins_processes(norm: nn.Module) -> bool:
    """Whether the norm takes its statistics over the batches of several processes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and distributed
        and torch.distributed.get_world_size(norm.process_group) > 1
    )


def check_temperature(name: str, value: Any) -> None:
    """Checks a temperature.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.

    Raises:
        ValueError: If ``value`` is not a number in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f'{name} must be a number in [0, 1], got {value!r}.')


def temperature_at(iteration: int, length: int, begin: float = 1.0, end: float = 0.0) -> float:
    """The temperature of an iteration, by the linear schedule of the paper (section 3.4).

    Args:
        iteration: The iteration of the training, counted from 0; -1 is before training.
        length: Length of the schedule in iterations; at least 1.
        begin: Temperature before the first iteration, in [0, 1].
        end: Temperature from the last iteration of the schedule on, in [0, 1].

    Raises:
        ValueError: If a temperature is out of range, if ``iteration`` is less than -1, or if
            ``length`` is less than 1.
        TypeError: If ``iteration`` or ``length`` is no number.

    Example:
        >>> model = mmkw.KWConv2d(8, 8, 3)
        >>> for iteration in range(3):
        ...     mmkw.set_temperature(model, mmkw.temperature_at(iteration, length=2))
        ...     model.attention.temperature
        0.5
        0.0
        0.0
    """
    for name, value in (('begin', begin), ('end', end)):
        check_temperature(name, value)
    for name, value in (('iteration', iteration), ('length', length)):
        if not is_number(value):
            raise TypeError(f'{name} must be a number, got {value!r}.')
    if not iteration >= -1:
        raise ValueError(f'iteration must be at least -1, before training, got {iteration!r}.')
    if not length >= 1:
        raise ValueError(f'length must be at least 1, got {length!r}.')
    return begin + (end - begin) * min(1.0, (iteration + 1) / length)


def set_temperature(model: nn.Module, tau: float) -> None:
    """Sets the temperature of every dynamic layer of a model.

    Args:
        model: Any model with KernelWarehouse layers, wrapped (DDP) or not.
        tau: Temperature in [0, 1]. At 1 every mixture is the one cell of the one-to-one start. At 0
            the attention alone decides. The comparators divide their logits by ``1 + 29 * tau``, 30
            to 1; ``CondConv2d`` has no temperature.

    Raises:
        ValueError: If ``tau`` is out of range or the model has no dynamic layer.
        TypeError: If ``model`` is no module.

    Example:
        >>> mmkw.set_temperature(mmkw.KWConv2d(8, 8, 3), 0.5)
    """
    check_temperature('tau', tau)
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module, got {model!r}.')
    attentions = [module for module in model.modules() if isinstance(module, LayerAttention)]
    if not attentions:
        raise ValueError(
            f'{type(model).__name__} has no KernelWarehouse layer whose temperature could be set. '
            "Use a backbone such as 'mmkw.KWResNet', or drop the temperature."
        )
    for attention in attentions:
        attention.temperature = float(tau)
        attention.has_begun = False
