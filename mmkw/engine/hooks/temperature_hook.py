"""Anneals the temperature of a KernelWarehouse network."""

from mmengine.hooks import Hook
from mmengine.hooks.hook import DATA_BATCH
from mmengine.runner import Runner

from ...layers import set_temperature, temperature_at
from ...layers.attention import check_temperature
from ...registry import HOOKS


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Changes the temperature linearly from ``begin`` to ``end``, and then keeps it.

    The schedule has ``T`` iterations. At iteration ``i``, counted from 0, the temperature is
    ``begin + (end - begin) * min(1, (i + 1) / T)`` (paper, section 3.4). It depends on the
    iteration only, so a resumed run continues the schedule. Checkpoints store the temperature, and
    a test with this hook uses the stored one. The value is logged as ``temperature``, also to the
    visualizer backends.

    The comparators divide their logits by ``1 + 29 * temperature``, so by 30 to 1 in the default
    schedule. DY-Conv and ODConv take 10 epochs on ImageNet.

    Args:
        length: Length of the schedule in epochs or iterations; at least 1. On ImageNet the paper
            takes 20 of 300 epochs, and 15 of 150 epochs for MobileNetV2.
        by_epoch: Whether ``length`` counts epochs. The temperature changes at every iteration in
            both cases.
        begin: Temperature before the first iteration, in [0, 1].
        end: Temperature from the last iteration of the schedule on, in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``by_epoch`` is neither True nor False.
    """

    def __init__(
        self, length: int, by_epoch: bool = True, begin: float = 1.0, end: float = 0.0
    ) -> None:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f'TemperatureHook: length must be an integer of at least 1, got {length!r}. '
                'Remove the hook to run at temperature 0.'
            )
        if not isinstance(by_epoch, bool):
            raise TypeError(f'TemperatureHook: by_epoch must be True or False, got {by_epoch!r}.')
        for name, value in (('begin', begin), ('end', end)):
            check_temperature(f'TemperatureHook: {name}', value)
        self.length = length
        self.by_epoch = by_epoch
        self.begin = begin
        self.end = end
        self._current = begin

    def temperature_at(self, iteration: int, epoch_length: int) -> float:
        """The temperature of an iteration, in [0, 1].

        Args:
            iteration: The iteration, counted from 0; -1 is before training.
            epoch_length: Iterations per epoch.
        """
        total = self.length * (epoch_length if self.by_epoch else 1)
        return temperature_at(iteration, total, self.begin, self.end)

    def before_train(self, runner: Runner) -> None:
        """Sets the temperature of the first iteration. Raises an error for a static model."""
        self._set_temperature(runner)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: DATA_BATCH = None
    ) -> None:
        """Sets and logs the iteration's temperature."""
        runner.message_hub.update_scalar('train/temperature', self._set_temperature(runner))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Stores the temperature in the checkpoint's meta data, for tests."""
        checkpoint['meta']['temperature'] = self._current

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Sets the stored temperature, for tests. Training sets its own temperature later."""
        meta = checkpoint.get('meta')
        tau = meta.get('temperature') if isinstance(meta, dict) else None
        if tau is not None:
            set_temperature(runner.model, tau)

    def _set_temperature(self, runner: Runner) -> float:
        self._current = self.temperature_at(runner.iter, len(runner.train_dataloader))
        set_temperature(runner.model, self._current)
        return self._current
