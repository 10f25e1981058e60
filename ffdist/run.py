"""Script for `ray submit`: runs `ffdist train` on the cluster of this machine.

`python ffdist/run.py mnist training.epochs=10` accepts the arguments of `ffdist train`, and
`python ffdist/run.py resume RUN` those of `ffdist resume`. It joins the cluster of this machine, and starts a local Ray
if there is none.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the folder of this file, or the working directory, whose files must not shadow packages

from ffdist.cli.train import resume, train

if __name__ == "__main__":
    is_resumed = sys.argv[1:2] == ["resume"]
    (resume if is_resumed else train)(sys.argv[1 + is_resumed :], obj={"address": None})
