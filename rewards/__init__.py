"""Reward terms and their composition; every term's value on every episode is kept."""

from palaestra.rewards._stack import Reward, RewardStack, Score
from palaestra.rewards._terms import Efficiency, Success, ToolValidity, Unsafe

__all__ = ["Efficiency", "Reward", "RewardStack", "Score", "Success", "ToolValidity", "Unsafe"]
