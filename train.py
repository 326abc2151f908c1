"""Train a small GPT on text, or resume a run from its last checkpoint.

  python train.py                                      readable English after minutes on two cores
  python train.py data=text data.path=book.txt         your own text
  python train.py model=modern-small model.n_layer=6   another shape
  python train.py -m optim.lr=1e-3,3e-3                a sweep
"""

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("train:train", "config", __doc__, multirun="sweep.grid:run_grid")

from contextlib import ExitStack

import atomic
from checkpointing import notices, store
from checkpointing.changes import limit_reached
from checkpointing.checkpoint import Checkpoint
from checkpointing.environment import open_device
from checkpointing.initial import InitialWeights
from checkpointing.memory_plan import check_memory, divides_weights, memory_advice
from checkpointing.resume import open_run
from checkpointing.run_folder import Run
from checkpointing.shared_disk import wait_until_shared
from checkpointing.state import State, new_state
from checkpointing.tokens import prepared_tokens, with_vocab_size
from conf.schema import as_yaml
from conf.settings import Settings
from data.run_data import RunData, open_data
from evaluation.tasks import read_slices
from generation.engine import Prompt
from generation.samples import print_samples
from report.page import after_training, is_current
from startup import start
from terminal import counted, say
from trainer import Trainer, open_trainer
from training.clock import Clock
from training.configure import configure
from training.decision import Decision, decide
from training.device import Device
from training.distributed import World
from training.interrupt import Interrupt


def train(settings: Settings) -> int:
    """Start or resume the run that `settings` describe; return the exit code.

    Under torchrun, this is one of several processes that train the run together.
    """
    world = World()
    with world.joined(use_gpus=settings.training.device != "cpu"):
        return train_together(settings, world)


def train_together(settings: Settings, world: World) -> int:
    """Train as one process of `world`. Only the first one writes, prints and samples."""
    # Find the weights to start from, and load the data, which decide the vocabulary.
    initial = InitialWeights()
    settings = world.first(lambda: initial.choose_settings(settings))
    data = load_data(settings, world)
    settings = with_vocab_size(settings, data.prepared)
    tasks = read_slices(settings.training.tasks(), data.tokenizer)
    # A device that this machine does not have is an error before the run's folder is touched.
    Device(settings.training.device, settings.training.precision)

    with ExitStack() as stack:
        # Lock the run's folder, and find its last checkpoint.
        run, settings, last = open_run(settings, data.prepared, world, stack)
        training = settings.training
        if last:
            wait_until_shared(last.folder)
        if last and limit_reached(training, last):
            return world.first(lambda: already_finished(run, settings, last, data.prompts))

        # Build the model and the optimizers.
        device = open_device(run, settings, last)
        stack.enter_context(configure(device, settings.model.dropout))
        sharded = divides_weights(settings, world, device)
        stack.enter_context(memory_advice(settings, world, device, sharded))
        loads_weights = bool(last or settings.init_from)
        state = new_state(settings, world, device, sharded, skip_init=loads_weights)

        # Restore the last checkpoint, or load the weights to start from.
        if last:
            state.restore(last)
        elif settings.init_from:
            state.load_weights(initial.load(settings, data.tokenizer))

        # Nothing is written before it is known that memory and disk space suffice.
        check_resources(settings, state, device, run)
        if world.is_first:
            atomic.write_bytes(run.folder / "config.yaml", as_yaml(settings).encode())

        # Train. A scheduler signals all processes, and torchrun signals them again: this is one
        # signal, so under torchrun a second one does not end them.
        with (Interrupt(second_ends=not world.by_torchrun) as interrupt, Clock() as clock,
              open_trainer(settings, data, tasks, state, device, run) as trainer):
            start(trainer, last, initial.messages)
            decision = training_loop(trainer, clock, interrupt)
            exit_code = trainer.end(decision, interrupt)
            if exit_code:
                return exit_code
            if settings.logger.report and world.is_first:
                trainer.recorder.say(after_training(run.folder))

        # Sample from the best checkpoint.
        if world.is_first:
            say(f"Trained {counted(state.step, 'step')} in {state.seconds:.0f} s, "
                f"and waited {trainer.saver.waiting_seconds:.1f} s for saving.")
            print_samples(run.folder, data.prompts, training, trainer.sampling_device)
        return 0


def load_data(settings: Settings, world: World) -> RunData:
    """Open the prepared text; the first process prepares it if necessary."""
    prepared = world.first(lambda: prepared_tokens(settings))
    wait_until_shared(prepared)
    training, block_size = settings.training, settings.model.block_size
    return open_data(prepared, settings.data, block_size, training.batch_size,
                     training.micro_steps(block_size, world.size), training.eval_tokens,
                     settings.seed, world.rank, world.size)


def check_resources(settings: Settings, state: State, device: Device, run: Run) -> None:
    """Raise ValueError unless a micro-step fits in memory, and two checkpoints on the disk."""
    if not state.optimizers.sharded:
        check_memory(settings, device, state.optimizers.world.local_size)
    if state.optimizers.world.is_first:
        store.check_free_space(run.checkpoints, state.nbytes())


def training_loop(trainer: Trainer, clock: Clock, interrupt: Interrupt) -> Decision:
    """Train until a limit or an interruption ends the run."""
    state, training, world = trainer.state, trainer.training, trainer.world
    decision = Decision()  # that of a run without steps: continue
    while not decision.ends_run:
        # Forward and backward passes, and the update of the weights.
        start = clock.seconds()
        step = trainer.take_step(interrupt)
        if step is None:
            break
        step_seconds = clock.seconds() - start

        # Decide, the same in all processes: evaluate, save, skip, roll back or stop.
        seconds, interrupted = world.agree(state.seconds + step_seconds, bool(interrupt))
        decision = decide(training, state.step + 1, seconds, step.finite, state.nonfinite,
                          interrupted)
        if not step.finite:
            trainer.handle_nonfinite(decision.action, step)
        if decision.action == "rollback":
            # The state is that of an earlier checkpoint now.
            continue

        # Count the step, and write its metrics.
        state.step += 1
        state.seconds = seconds
        trainer.record(step, step_seconds)

        # Evaluate and save. Sampling comes last: if it fails, the checkpoint is on the disk.
        trainer.val_loss = None
        if decision.evaluate:
            decision = trainer.evaluate(decision)
        if decision.save:
            trainer.start_save()
        if decision.evaluate:
            trainer.sample()
        trainer.saver.check()
    return decision


def already_finished(run: Run, settings: Settings, last: Checkpoint, prompts: list[Prompt]) -> int:
    """Say that the run is finished; prune and report if a kill prevented that."""
    training = settings.training
    advice = notices.how_to_continue(limit_reached(training, last), settings, last)
    say(f"{run.folder} is finished: {counted(last.step, 'step')}, "
        f"{last.state['seconds']:.0f} s. {advice}")
    store.prune(run.checkpoints, training.keep_last)
    if settings.logger.report and not is_current(run.folder):
        say(after_training(run.folder))
    print_samples(run.folder, prompts, training, Device(training.device, training.precision))
    return 0
