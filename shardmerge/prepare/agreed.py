"""The last word on a plan: config.json and tensors agree, and transformers loads it where that is asked for."""

from __future__ import annotations

from shardmerge.plan.value import Plan
from shardmerge.prepare.options import Options
from shardmerge.prepare.publishable import Conditions, publishable
from shardmerge.prepare.side_files import SideFiles


def agreed(plan: Plan, sides: SideFiles, conditions: Conditions, options: Options) -> Plan:
    """Returns a plan whose config.json and tensors agree; where that is asked for, also as transformers sees it."""
    plan = publishable(plan, sides.read, conditions)
    if options.check is None:
        return plan
    from shardmerge.prepare.loading import load_checked

    return load_checked(plan, sides.read, conditions)
