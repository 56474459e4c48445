"""Pictures of what a model sees and has learned, in one style: each is a function and a command.

`views` and the tokens that are matched, `features` of tokens on the sphere, where an answer looked (`heat`), and what
`runs` of the trainer and the evaluation have left; `python -m panorama_vlm.pictures` has the commands.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'panorama-vlm[pictures]'") from error

from .features import Features, draw_features, paint_tokens, principal_components, token_features
from .figure import new_figure, to_image
from .heat import Saliency, draw_saliency, heat_map, hottest, saliency
from .runs import Sector, accuracy_by_direction, draw_curves, draw_directions, read_run
from .views import draw_matches, draw_views, outline

__all__ = [
    "Features",
    "Saliency",
    "Sector",
    "accuracy_by_direction",
    "draw_curves",
    "draw_directions",
    "draw_features",
    "draw_matches",
    "draw_saliency",
    "draw_views",
    "heat_map",
    "hottest",
    "new_figure",
    "outline",
    "paint_tokens",
    "principal_components",
    "read_run",
    "saliency",
    "to_image",
    "token_features",
]
