"""What `ray submit` sends to a cluster: `ffdist train` on the Ray that this machine is part of.

`python ffdist/run.py mnist training.epochs=10` takes what `ffdist train` takes. It joins the cluster it runs on, and
starts a local Ray where there is none.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the folder of this file, or the working directory: other files there are not for import

from ffdist.cli.training import train

if __name__ == "__main__":
    train(obj={"address": None})
