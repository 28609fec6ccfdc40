"""What a job says of the machine that it landed on: can a sweep keep its results there?

python -m orchestrator.cluster.probe STORAGE
"""

import sys
from pathlib import Path

from orchestrator.storage_check import check_storage
from qkmodel.errors import InputError

if __name__ == "__main__":
    try:
        check_storage("probe", Path(sys.argv[1]).expanduser())
    except InputError as error:
        sys.exit(str(error))
