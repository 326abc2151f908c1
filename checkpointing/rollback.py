"""The answer to a loss or gradient that is NaN or infinite: stop, skip the batch, or roll back."""

from __future__ import annotations

from checkpointing import store
from checkpointing.run_folder import Run
from checkpointing.saver import Saver
from checkpointing.state import State
from terminal import counted
from training import nonfinite
from training.config import TrainingConfig
from training.distributed import World
from training.recorder import Recorder


def answer_nonfinite(action: str, loss: float, sequences: list[int], state: State, run: Run,
                     limits: TrainingConfig, recorder: Recorder, saver: Saver,
                     world: World) -> None:
    """Write a report, drop the gradients, and do what `action` says.

    "skip" leaves the weights as they are. "rollback" returns to the last scheduled checkpoint and
    steps over all batches since. "stop" raises ValueError. `sequences` are where the sequences of
    the step's batch start in the training split.
    """
    state.nonfinite += 1
    message = f"Step {state.step + 1} had a loss of {loss:.4g} and a gradient that is not finite"
    if world.is_first:
        message += write_report(action, loss, sequences, state, run, recorder)
    state.optimizers.zero_grad(state.scaler)
    if action == "skip":
        recorder.say(f"{message} Its batch is skipped.")
        return
    saver.finish()
    if action == "stop":
        if state.nonfinite > 1:
            message += (f" It is number {state.nonfinite} in this run, and "
                        f"training.nonfinite_limit={limits.nonfinite_limit}.")
        saved = world.first(lambda: saver.saved)
        world.fail(ValueError(
            f"{message} Saved so far: {counted(saved, 'step')}. Try a lower optim.lr, "
            f"optim.grad_clip=1, training.precision=fp32, or training.on_nonfinite=skip or "
            f"rollback."))
    last = world.first(lambda: store.load_checkpoint(
        run.checkpoints, "scheduled", store.verified, recorder.say, rename_damaged=True))
    if last is None:
        world.fail(ValueError(f"{message} There is no checkpoint to return to."))
    state.roll_back(last)
    recorder.cut_back(state.step)
    if world.is_first:
        store.delete_after(run.checkpoints, state.step)
        saver.saved = state.step
    recorder.say(f"{message} Returning to step {state.step}, past the batches since then.")


def write_report(action: str, loss: float, sequences: list[int], state: State, run: Run,
                 recorder: Recorder) -> str:
    """Write a report of the step; return the end of a sentence that tells where it is."""
    batch = {"index": state.batch, "sequences_start_at": sequences}
    try:
        path = nonfinite.report(run.folder, state.nonfinite, state.step, batch, loss,
                                state.optimizers, recorder.recent, action)
    except OSError as error:
        return f"; the report of it could not be written ({error.strerror})."
    return f": see {path}."
