"""Search a space of settings with Optuna (pip install optuna); each trial is a training run.

  python -m scripts.sweep sweep=lr_width                     20 trials, into runs/lr_width/trial_0000...
  python -m scripts.sweep sweep=lr_width trials=100 jobs=4   four at a time
  python -m scripts.sweep sweep=my.yaml optim.lr=1e-3        any setting of train.py is fixed

The same command again resumes the search and its interrupted trials. On several machines that share
the folder, it works on the same study. Unpromising trials are pruned. At the end it prints the
command line of the best trial.

  sweep=NAME       the space: conf/sweep/NAME.yaml, or a YAML file; see sweep/space.py
  name=NAME        of the folder below runs_dir, and of the study; the default is the space's name
  trials=20        in all, including earlier ones and those of other machines; null for no limit
  hours=null       of this command; trials that run then are saved, to be resumed
  jobs=1           trials at a time
  pruner=median    how unpromising trials are found: median, hyperband or none
  storage=URL      of the study, for Optuna; the default is a journal in the folder, study.log
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    launch("sweep.search:search", "sweep.search:SweepSettings", __doc__)
