"""Search a space of settings with Optuna (pip install optuna); each trial is a training run.

  python -m scripts.sweep sweep=lr_width                    20 trials, in runs/lr_width/trial_*
  python -m scripts.sweep sweep=lr_width trials=100 jobs=4  four at a time
  python -m scripts.sweep sweep=my.yaml optim.lr=1e-3       any setting of train.py can be fixed

The same command again resumes the search and its interrupted trials. On several machines that share
the folder, it works on the same study. Unpromising trials are pruned. At the end it prints the
command line of the best trial. sweep/space.py documents the YAML file of a space.
"""

from conf.launch import launch
from sweep.search import SweepSettings, search

if __name__ == "__main__":
    launch(search, SweepSettings, __doc__)
