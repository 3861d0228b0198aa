"""What a label must lie within to be believed, in labels.csv as in tables of measurements."""

import numpy as np

WEDGE, PA_MEAN = "mpcwp_mmhg", "mpap_mmhg"
RANGES = {
    WEDGE: (1.0, 60.0),
    PA_MEAN: (3.0, 100.0),
    "pasp_mmhg": (5.0, 150.0),
    "padp_mmhg": (1.0, 100.0),
    "cvp_mmhg": (0.0, 40.0),
    "mrap_mmhg": (-10.0, 50.0),
    **dict.fromkeys(("co_l_min", "co_fick_l_min", "co_thermodilution_l_min", "co_continuous_l_min"), (0.5, 20.0)),
}
"""Both ends included. A value outside is a slip of the pen or a broken transducer; 0 and 999 in a chart mean "not
measured"."""
ANY_NUMBER = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))
"""The range of any other label: what the store's float32 holds."""


def plausible_range(label: str) -> tuple[float, float]:
    """Lowest and highest value of a label."""
    return RANGES.get(label, ANY_NUMBER)
