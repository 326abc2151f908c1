"""Before the first step: describe the run, compile the model, estimate the time of training."""

from dataclasses import asdict

from checkpointing import notices
from checkpointing.changes import settings_to_save
from checkpointing.checkpoint import Checkpoint
from checkpointing.provenance import record_start
from trainer import Trainer
from training.compiling import check_fused_loss, maybe_compile
from training.device import Environment
from training.estimate import Workload, measure_pace
from training.step import BatchLoss, first_loss


def start(trainer: Trainer, last: Checkpoint | None, imported: list[str]) -> None:
    """Do what precedes the first step, or the first one after the checkpoint `last`.

    `imported` are messages about the weights of init_from=.
    """
    describe(trainer, last, imported)
    # Compile the model where that pays. The last bits of the result depend on it.
    trainer.loss_fn = compiled_loss(trainer)
    environment = trainer.device.environment(is_compiled(trainer), trainer.world.size)
    record_environment(trainer, environment)
    estimate_time(trainer)
    if trainer.training.on_nonfinite == "rollback" and not last:
        # A checkpoint to return to.
        trainer.start_save()


def describe(trainer: Trainer, last: Checkpoint | None, imported: list[str]) -> None:
    """Describe the run, its data and device, and the changes since it was started."""
    say, state = trainer.recorder.say, trainer.state
    notices.describe_run(say, trainer.run.folder, trainer.device, state, trainer.data)
    for line in imported:
        say(line)
    notices.describe_changes(say, trainer.settings, state, last)


def compiled_loss(trainer: Trainer) -> BatchLoss:
    """The loss by the compiled model where that pays, otherwise at most with a compiled loss."""
    training, say, batch = trainer.training, trainer.recorder.say, trainer.data.first_batch
    choice = "false" if trainer.state.optimizers.sharded else training.compile
    # Compiling takes minutes: the length of the run decides whether that pays.
    flops = trainer.step_flops * training.max_steps
    if training.max_seconds:
        flops = min(flops, training.max_seconds * trainer.device.nominal_flops())
    loss_fn = maybe_compile(trainer.loss_fn, batch, choice, flops, say)
    # The compiled model contains the loss.
    if loss_fn is trainer.loss_fn:
        check_fused_loss(loss_fn, batch, say)
    return loss_fn


def is_compiled(trainer: Trainer) -> bool:
    return trainer.loss_fn.model is not trainer.state.model


def record_environment(trainer: Trainer, environment: Environment) -> None:
    """Record the machine and the versions, on which the last bits of the result depend."""
    state, settings = trainer.state, trainer.settings
    if trainer.world.is_first:
        record_start(trainer.run.folder, state.step, asdict(environment))
    saved_settings = settings_to_save(settings, trainer.data.prepared, trainer.device.precision)
    trainer.constants = {"settings": saved_settings, "max_steps": settings.training.max_steps,
                         "model": asdict(state.model.config), "environment": asdict(environment)}


def estimate_time(trainer: Trainer) -> None:
    """Estimate the time that training takes, for a message and the progress bar."""
    data, state, training = trainer.data, trainer.state, trainer.training
    # Time a part of a step.
    has_one_shape = is_compiled(trainer) or state.model.loss_options is not None
    work = Workload(training, trainer.settings.optim, state.model.parameters_by_role(),
                    data.loader.micro_steps, sum(data.validation.n_windows), has_one_shape)
    pace = measure_pace(first_loss(trainer.loss_fn, data.first_batch), work, trainer.device,
                        trainer.world)

    # The steps that are left end at max_steps, or earlier at max_seconds.
    steps_left, _ = pace.work_left(training, state.step, state.seconds)
    trainer.recorder.expect(pace.seconds_left(training, state.step, state.seconds),
                            limited=steps_left < training.max_steps - state.step)
    trainer.recorder.say(f"Time: {pace.describe(training, state.step, state.seconds)}")
