"""Probes: named extras that ``extract`` computes for every input in addition to features and logits."""

from ood_scores.extraction.probes.base import PROBES, LayerProbe, Pass, Probe, as_probes, probe_from, register_probe
from ood_scores.extraction.probes.gradients import LayerGradients, ParameterGradients
from ood_scores.extraction.probes.input_perturbation import FGSM, ODIN
from ood_scores.extraction.probes.layers import GramSums, LayerNorms, PooledLayers
from ood_scores.extraction.probes.reruns import MCDropout, RankFeat

__all__ = [
    "FGSM",
    "ODIN",
    "PROBES",
    "GramSums",
    "LayerGradients",
    "LayerNorms",
    "LayerProbe",
    "MCDropout",
    "ParameterGradients",
    "Pass",
    "PooledLayers",
    "Probe",
    "RankFeat",
    "as_probes",
    "probe_from",
    "register_probe",
]
