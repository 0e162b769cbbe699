"""Papers that are the source of scorers in several modules; all others are named in the tags of their scorer."""

from ood_scores.scorers.tags import Paper

HUANG_2021 = Paper(
    "On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
    "Rui Huang, Andrew Geng, Yixuan Li",
    "NeurIPS",
    2021,
    "https://arxiv.org/abs/2110.00218",
    "https://github.com/deeplearning-wisc/gradnorm_ood",
)

HAAS_2024 = Paper(
    "Exploring Simple, High Quality Out-of-Distribution Detection with L2 Normalization",
    "Jarrod Haas, William Yolland, Bernhard Rabus",
    "TMLR",
    2024,
    "https://openreview.net/forum?id=daX2UkLMS0",
)

LEE_2018 = Paper(
    "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    "Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin",
    "NeurIPS",
    2018,
    "https://arxiv.org/abs/1807.03888",
    "https://github.com/pokaxpoka/deep_Mahalanobis_detector",
)

HENDRYCKS_2022 = Paper(
    "Scaling Out-of-Distribution Detection for Real-World Settings",
    (
        "Dan Hendrycks, Steven Basart, Mantas Mazeika, Andy Zou, Joseph Kwon, Mohammadreza Mostajabi, "
        "Jacob Steinhardt, Dawn Song"
    ),
    "ICML",
    2022,
    "https://arxiv.org/abs/1911.11132",
    "https://github.com/hendrycks/anomaly-seg",
)

SHIN_2024 = Paper(
    "Representation Norm Amplification for Out-of-Distribution Detection in Long-Tail Learning",
    "Dong Geun Shin, Hye Won Chung",
    "TMLR",
    2024,
    "https://arxiv.org/abs/2408.10676",
    "https://github.com/dgshin21/RNA",
)
