"""Every preset, by the name that --preset has for it."""

from cases.extras import Extras
from cases.focal import Focal
from cases.goals import Goals
from cases.head import Head
from cases.heads import Heads
from cases.ladder import Ladder
from cases.pairwise import Pairwise
from cases.peers import Peers
from cases.preset import Preset
from cases.training import Training
from cases.workloads import Workloads

DEFAULT = "ladder"
PRESETS: dict[str, Preset] = {
    "ladder": Ladder(),
    "goals": Goals(),
    "workloads": Workloads(),
    "training": Training(),
    "peers": Peers(),
    "extras": Extras(),
    "heads": Heads(),
    "focal": Focal(),
    "head": Head(),
    "pairwise": Pairwise(),
}
