"""Every architecture that `staterank_utils.architectures` describes, as a tiny model with its recurrence in float64."""

from importlib.util import find_spec

from architectures import delta, fla_models, mlstm, ssd

ARCHITECTURES = delta.ARCHITECTURES | ssd.ARCHITECTURES | mlstm.ARCHITECTURES
if find_spec("fla") is not None:
    ARCHITECTURES |= fla_models.ARCHITECTURES
