"""What the help says of choices is what there is."""

import re
from pathlib import Path
from typing import get_args

from pageferry.cli.options import TrackerOption
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.kvm.trackers import TRACKERS

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "trackers.md"


def test_the_help_and_the_guide_name_every_tracker():
    help_text = get_args(TrackerOption)[1].help
    on_soft, on_kvm = re.fullmatch(r".*: (.*) \(soft\), (.*) \(kvm\)\.", help_text).groups()
    assert re.split(r", | or ", on_soft) == list(PAGING_MODES)
    assert re.split(r", | or ", on_kvm) == list(TRACKERS)
    costs = GUIDE.read_text().partition("| tracker | ENABLE |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(.*?)` \|", costs, re.M)) == {*PAGING_MODES, *TRACKERS}
