"""What a job says of the machine that it landed on: is this program whole there, can a sweep keep its results?

python -m orchestrator.cluster.probe STORAGE
"""

import importlib.util
import sys

from orchestrator.storage_check import check_storage
from qkmodel.errors import InputError

# looked for, not imported: that takes seconds, and this is waited for
PACKAGES = ("torch", "ray", "optuna", "mlflow", "transformer_lens")

if __name__ == "__main__":
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"No module named '{missing[0]}'")
    try:
        check_storage("probe", sys.argv[1])
    except InputError as error:
        sys.exit(str(error))
