"""The former home of `Packer`, for one release: it stands in `splitquant_plugins.backends` now."""

import warnings

from splitquant_plugins.backends import Packer as Packer
from splitquant_plugins.errors import SplitQuantWarning

warnings.warn(
    "splitquant_plugins.streaming.packer: import Packer from splitquant_plugins.backends", SplitQuantWarning, 2
)
