"""Telling transformers that there are split checkpoints, whenever it is imported: before this package or after it.

transformers finds quantizers in two dictionaries of `transformers.quantizers.auto`, which others add to in Python; it
reads no entry points, and a config.json names no package. So `import splitquant_plugins` has to bring the entries
about, and must import neither transformers nor torch for that, as every plugin imports this package. Where transformers
is imported already, they are made at once. Where it is not, a finder waits in `sys.meta_path` for that one module, lets
it load as ever, adds the entries, and is gone: what setuptools does for distutils, and wrapt offers as post-import
hooks. Entries that are made by the first use of the package would come too late: `from_pretrained` is the first use.
"""

from __future__ import annotations

import sys
from typing import Any

from splitquant_plugins.pretrained.when_imported import when_imported

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Add the entries to transformers' registry now, or as soon as transformers makes it."""
    when_imported(REGISTRY, lambda: _add_entries(sys.modules[REGISTRY]))


def _add_entries(registry: Any) -> None:
    from splitquant_plugins.checkpoints.pretrained_config import METHOD
    from splitquant_plugins.pretrained.checkpoint_config import SplitCheckpointConfig
    from splitquant_plugins.pretrained.quantizer import SplitCheckpointQuantizer

    # Once more after a reload of either: the registry refuses a name that is there.
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SplitCheckpointConfig
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = SplitCheckpointQuantizer
