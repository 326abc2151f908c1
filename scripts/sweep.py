"""Search a space of settings with Optuna (pip install optuna), each trial a training of its own.

  python -m scripts.sweep sweep=lr_width                      20 trials, into runs/lr_width/trial_0000, trial_0001, ...
  python -m scripts.sweep sweep=lr_width trials=100 jobs=4    four at a time
  python -m scripts.sweep sweep=my.yaml training.max_steps=50      any setting of train.py, fixed for all trials

Typed again it goes on where it was, and with what was cut off; typed on several machines that share the folder it works on
one study. Trials whose validation loss is hopeless are stopped early. At the end it prints the best command line.

  sweep=NAME       the space: conf/sweep/NAME.yaml, or a YAML file; see sweep/space.py
  name=NAME        of the folder below runs_dir, and of the study; without it, the space's
  trials=20        in all, those of earlier times and other machines included; null for no limit
  hours=null       of this search; what runs then is saved and left for the next time
  jobs=1           trials at a time
  pruner=median    how hopeless trials are told: median, hyperband or none
  storage=URL      where the study lies, for Optuna; without it, a journal in the folder: study.log
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    launch("sweep.search:search", "sweep.search:SweepSettings", __doc__)
