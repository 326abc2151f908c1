"""Names of Hydra, nanoGPT and Hugging Face, and the names of the same settings here.

Only error messages use these tables: they suggest the name on the left for one on the right.
"""

import difflib
import re
from collections.abc import Iterable

# The names of other projects by ours, without those that are spelled alike. The last part of a name
# is compared, so optimizer.learning_rate is learning_rate.
OTHER_NAMES = {
    "optim.lr": "learning_rate max_lr peak_lr base_lr",
    "optim.min_lr_ratio": "min_lr min_learning_rate final_lr",
    "optim.warmup_steps": "warmup warmup_ratio",
    "optim.schedule": "lr_scheduler_type decay_lr",
    "optim.grad_clip": "max_grad_norm clip_grad gradient_clip_val gradient_clipping clip_grad_norm",
    "optim.beta1": "adam_beta1 betas",
    "optim.beta2": "adam_beta2",
    "optim.weight_decay": "wd",
    "optim.optimizer": "optim_type",
    "training.max_steps":
        "num_iterations iterations lr_decay_iters num_train_epochs num_epochs epochs n_epochs",
    "training.max_seconds": "max_time time_limit",
    "training.batch_size": "per_device_train_batch_size",
    "training.tokens_per_step": "gradient_accumulation_steps grad_accum_steps grad_accumulation "
                                "accumulate_grad_batches total_batch_size global_batch_size",
    "training.eval_every":
        "eval_interval eval_steps val_check_interval eval_strategy evaluation_strategy",
    "training.eval_tokens": "eval_iters eval_batches val_steps",
    "training.checkpoint_every": "save_steps save_interval save_every always_save_checkpoint",
    "training.keep_last": "save_total_limit save_top_k",
    "training.device": "accelerator use_cuda no_cuda use_cpu gpu gpus",
    "training.precision": "dtype torch_dtype bf16 fp16 amp use_amp",
    "training.recompute": "gradient_checkpointing activation_checkpointing",
    "model.n_embd": "hidden_size d_model embed_dim embedding_dim emb_dim dim width",
    "model.n_layer": "num_hidden_layers depth",
    "model.n_head": "num_attention_heads heads",
    "model.n_kv_head": "num_key_value_heads",
    "model.block_size": "context_length context_size seq_len seq_length sequence_length "
                        "max_seq_len max_seq_length n_ctx n_positions max_position_embeddings",
    "model.activation": "hidden_act activation_function act_fn",
    "model.dropout": "attn_pdrop resid_pdrop embd_pdrop",
    "model.tie_head": "tie_word_embeddings weight_tying tie_weights",
    "data.path": "train_file input_file data_path data_dir input corpus file files",
    "data.hub_name": "dataset_name",
    "data.hub_config": "dataset_config_name dataset_config",
    "data.text_field": "text_column text_key",
    "data.val_fraction": "val_split validation_split_percentage test_size",
    "model": "model_type model_name model_name_or_path",
    "logger.wandb": "wandb_mode report_to",
    "logger.group": "wandb_group",
    "name": "run_name wandb_run_name experiment_name exp_name",
    "runs_dir": "out_dir output_dir save_dir log_dir logging_dir checkpoint_dir",
    "restart": "overwrite_output_dir",
    "seed": "random_seed manual_seed data_seed",
    "prompt": "start text input_text",  # from here: of sample.py
    "max_new_tokens": "max_length length",
    "num_samples": "num_return_sequences n",
    "temperature": "temp",
    "precision": "dtype torch_dtype",
    "run": "ckpt_path model_path checkpoint_path",
}
# Where the setting's unit is not that of the other name.
UNITS = {
    "min_lr": "it is a part of optim.lr",
    "warmup_ratio": "it counts steps",
    "gradient_accumulation_steps": "it counts the tokens of all micro-batches of a step",
    "num_train_epochs": "it counts steps",
    "epochs": "it counts steps",
    "eval_iters": "it counts tokens",
}
OTHER_VALUES = {
    "gpu": "cuda", "cuda:0": "cuda", "metal": "mps", "float32": "fp32", "32": "fp32",
    "single": "fp32", "bfloat16": "bf16", "float16": "fp16", "16": "fp16", "half": "fp16",
    "adam": "adamw", "linear": "wsd"}
# Advice by a pattern for the beginning of a key or flag, mostly of Hydra's; the first that fits
# counts.
HYDRA = {
    r"hydra\.(run|sweep)\b": "runs_dir=FOLDER and name=NAME say where a run or a sweep goes",
    r"hydra\.job\.": "name=NAME names a run, and the working folder does not change",
    r"hydra\.mode": "-m runs a sweep",
    r"hydra\.searchpath|--config-|-c[dnp]$":
        "experiment=path/to/own.yaml reads a YAML file from anywhere",
    "hydra/launcher": "add -m; a sweep runs two jobs at a time with jobs=2, or on a cluster with "
                      "hydra/launcher=slurm",
    r"hydra\.launcher": "add -m and hydra/launcher=slurm; it is for sweeps on a cluster",
    "hydra[./]sweeper": "python -m scripts.sweep searches with Optuna",
    "gpus_per_job": "add -m and processes_per_job=N; on a machine with GPUs, each process has one",
    "hydra": "Hydra's own settings do nothing; a run's folder holds its log.txt and config.yaml",
    "--info|-i$": "--help lists the presets, and --cfg job prints all settings",
    "--hydra-help": "--help lists flags, presets and settings",
    "--version": "git describe names the version of a checkout",
    "--package|-p$": "--cfg job prints all settings",
    "--shell-completion|-sc$": "completion of settings in the shell is not supported",
    "--experimental-rerun": "experiment=runs/NAME/config.yaml runs the settings of a run again",
    "--run|-r$": "leave it out: without flags, the command runs",
}


def our_name(key: str, known: set[str]) -> str:
    """The one of our names in `known` that others call `key`; empty where there is none."""
    for ours, others in OTHER_NAMES.items():
        if ours in known and last_part(key) in others.split():
            return ours
    return ""


def last_part(key: str) -> str:
    """The name without its group, as other projects may write it: n-layer is n_layer."""
    return key.rpartition(".")[2].replace("-", "_").lower()


def unit_note(key: str) -> str:
    """": it counts steps", where our setting for the name `key` has another unit; else empty."""
    note = UNITS.get(key.rpartition(".")[2])
    return f": {note}" if note else ""


def instead_of_hydras(name: str) -> str:
    """The alternative to a setting or flag of Hydra's; empty for any other name."""
    for pattern, advice in HYDRA.items():
        if re.match(pattern, name):
            return advice
    return ""


def closest(word: str, words: Iterable[str]) -> str:
    """' (did you mean X?)', or nothing where no word is close."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
