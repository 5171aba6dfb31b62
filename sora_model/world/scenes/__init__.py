"""The scenes, one file each. A new one is a file like these and a row here."""

from ..base import Scene
from .bite import Bite
from .bounce import Bounce
from .loop import Loop
from .occluder import Occluder
from .orbit import Orbit
from .paint import Paint
from .parabola import Parabola
from .turn_back import TurnBack

REGISTRY: dict[str, type[Scene]] = {
    scene.name: scene for scene in (Bounce, Parabola, Occluder, TurnBack, Bite, Paint, Orbit, Loop)
}
