"""Policies, engines, rendering, the rollout runner and evaluation."""

from palaestra.agents._chat_policy import ChatPolicy
from palaestra.agents._cutoff import Cutoff
from palaestra.agents._engine import Completion, Engine, EngineStats, Sampling
from palaestra.agents._evaluate import EvalReport, aevaluate, episode_seed, evaluate, summarise
from palaestra.agents._policy import EnginePolicy, ExpertPolicy, ModelPolicy, Policy, RandomPolicy, Session
from palaestra.agents._renderer import Renderer
from palaestra.agents._runner import cancelled_episode, run_episode
from palaestra.agents._statistics import Proportion, pass_at_k, wilson, wilson_of_tasks

__all__ = [
    "ChatPolicy",
    "Completion",
    "Cutoff",
    "Engine",
    "EnginePolicy",
    "EngineStats",
    "EvalReport",
    "ExpertPolicy",
    "ModelPolicy",
    "Policy",
    "Proportion",
    "RandomPolicy",
    "Renderer",
    "Sampling",
    "Session",
    "aevaluate",
    "cancelled_episode",
    "episode_seed",
    "evaluate",
    "pass_at_k",
    "run_episode",
    "summarise",
    "wilson",
    "wilson_of_tasks",
]
