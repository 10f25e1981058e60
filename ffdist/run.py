"""What `ray submit` sends to a cluster: `ffdist train` on the Ray that this machine is part of.

`python ffdist/run.py mnist training.epochs=10` takes what `ffdist train` takes. It joins the cluster it runs on, and
starts a local Ray where there is none.
"""

from ffdist.cli.training import train

if __name__ == "__main__":
    train(obj={"address": None})
