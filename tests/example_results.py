"""Invented results, shaped as real ones are: no hospital, no patient and no model stands behind a figure."""

import math

import numpy as np
from scipy.stats import norm

from server.report.results import (
    Baselines,
    Calibration,
    CalibrationBin,
    Comparisons,
    Estimate,
    Fairness,
    Gap,
    LocalOnly,
    ModelSummary,
    OperatingPoint,
    Oracle,
    Pooled,
    PrecisionRecall,
    Privacy,
    Regression,
    Results,
    RoundMetrics,
    SiteMean,
    SiteResult,
    SiteSummary,
    SubgroupResult,
    TargetResult,
    Threshold,
    WorstGroup,
)
from shared_model.ecg_paper import ExampleEcg

SITES = (
    # name, patients, share labelled, prevalence, AUROC, local-only AUROC
    ("Invented General", 2000, 1.0, 0.34, 0.801, 0.752),
    ("Invented University Hospital", 1200, 0.5, 0.41, 0.795, 0.731),
    ("Invented County", 350, 0.3, 0.22, 0.782, 0.644),
    ("Invented Heart Centre", 80, 0.0, None, None, None),
)
PRIMARY, COMPLEMENTARY = "suppressed (<11)", "suppressed (would reveal another group)"
GROUPS = (
    # partition, group, patients, positives, AUROC or the reason for suppression
    ("sex", "female", 330, 105, 0.787),
    ("sex", "male", 390, 145, 0.801),
    ("age", "18-35", None, None, PRIMARY),
    ("age", "35-50", None, None, COMPLEMENTARY),
    ("age", "50-75", 405, 140, 0.797),
    ("age", ">=75", 185, 80, 0.741),
    ("race", "white", 480, 165, 0.797),
    ("race", "black", 130, 50, 0.771),
    ("race", "asian", None, None, COMPLEMENTARY),
    ("race", "unknown", None, None, PRIMARY),
    ("sex x age", "female, 50-75", 180, 60, 0.786),
    ("sex x age", "male, 50-75", 225, 80, 0.804),
)


def interval(value: float, half_width: float, method: str, bound: float | None = None) -> Estimate:
    """An estimate with a symmetric interval."""
    low, high = max(value - half_width, 0.0), min(value + half_width, 1.0)
    return Estimate(value=value, low=low, high=high, bound=bound, method=method)


def binormal_roc(auroc: float, points: int = 33) -> tuple[tuple[float, float], ...]:
    """The curve of two normal scores of equal spread whose area is `auroc`."""
    false_positive_rate = np.linspace(0, 1, points)
    distance = math.sqrt(2) * norm.ppf(auroc)
    true_positive_rate = norm.cdf(norm.ppf(false_positive_rate) + distance)
    return tuple(zip(false_positive_rate.tolist(), true_positive_rate.tolist(), strict=True))


def example_classification() -> TargetResult:
    """The study's own target."""
    bins = tuple(
        CalibrationBin(mean_predicted=p, observed=o, low=o - w, high=o + w, patients=n)
        for p, o, w, n in (
            (0.07, 0.09, 0.05, 130),
            (0.18, 0.17, 0.06, 150),
            (0.31, 0.35, 0.08, 140),
            (0.46, 0.43, 0.09, 120),
            (0.61, 0.64, 0.09, 105),
            (0.80, 0.76, 0.09, 75),
        )
    )
    return TargetResult(
        kind="classification",
        patients=720,
        positives=250,
        auroc=interval(0.793, 0.034, "DeLong on the logit scale, one index ECG a patient", bound=0.0008),
        auprc=PrecisionRecall(value=0.667, low=0.61, high=0.72, bound=0.004, prevalence=0.347, method="bootstrap"),
        brier=0.178,
        calibration=Calibration(intercept=-0.04, slope=0.93, expected_over_observed=1.02, bins=bins),
        operating_point=OperatingPoint(
            threshold=0.31,
            sensitivity=interval(0.804, 0.05, "Wilson"),
            specificity=interval(0.617, 0.044, "Wilson"),
            ppv=interval(0.527, 0.05, "Wilson"),
            npv=interval(0.856, 0.04, "Wilson"),
        ),
        roc=binormal_roc(0.793),
        all_ecg_auroc=interval(0.788, 0.03, "patient-level Poisson bootstrap, 200 replicates"),
    )


def example_regression() -> TargetResult:
    """A second target, in mmHg."""
    no_class = "the target is a pressure, not a class"
    return TargetResult(
        kind="regression",
        patients=720,
        positives=250,
        auroc=interval(0.788, 0.035, "DeLong", bound=0.0008),
        auprc=PrecisionRecall(reason=no_class),
        calibration=Calibration(reason=no_class),
        operating_point=OperatingPoint(reason=no_class),
        all_ecg_auroc=Estimate(reason="the study ran without bootstrap replicates"),
        regression=Regression(rmse=6.71, mae=5.12, pearson_r=0.55, r2=0.30, bias=-0.4, mean_predictor_rmse=8.02),
        reason="brier: " + no_class,
    )


def example_sites() -> tuple[SiteSummary, ...]:
    """Four hospitals; the last has no labels."""
    return tuple(
        SiteSummary(
            name=name,
            simulated=True,
            patients=patients,
            records=patients * 2,
            train_patients=5 * round(0.6 * patients / 5),
            validation_patients=5 * round(0.2 * patients / 5),
            test_patients=5 * round(0.2 * patients / 5),
            labelled_train_patients=5 * round(0.6 * patients * labelled / 5),
            prevalence=prevalence,
            reason="prevalence: the site has no labels" if prevalence is None else None,
        )
        for name, patients, labelled, prevalence, _, _ in SITES
    )


def group_figures(patients: int | None, positives: int | None, auroc: float | str) -> dict[str, object]:
    """The figures of one group, or its suppression."""
    if patients is None or positives is None or isinstance(auroc, str):
        return {"suppressed": True, "reason": auroc}
    spread = 0.5 / math.sqrt(min(positives, patients - positives))
    return {
        "patients": patients,
        "positives": positives,
        "auroc": interval(auroc, spread, "DeLong on the logit scale", bound=0.003),
        "sensitivity": interval(auroc, spread, "Wilson"),
        "specificity": interval(auroc - 0.17, spread, "Wilson"),
        "calibration_slope": round(0.2 + auroc, 2),
        "expected_over_observed": 1.01,
    }


def example_fairness() -> Fairness:
    """The worst group and the widest gap of GROUPS."""
    worst = interval(0.741, 0.056, "DeLong on the logit scale")
    return Fairness(
        worst_group=WorstGroup(partition="age", group=">=75", auroc=worst),
        largest_gap=Gap(
            partition="age",
            groups=("50-75", ">=75"),
            value=0.056,
            low=-0.014,
            high=0.126,
            method="difference of independent DeLong estimates",
            note="The widest of 4 pairs; the interval is not corrected for having been picked.",
        ),
    )


def by_site(mean: float, above_federated: float) -> SiteMean:
    """AUROC at each hospital, by so much above the federated model's."""
    sites = {name: None if auroc is None else auroc + above_federated for name, *_, auroc, _ in SITES}
    return SiteMean(mean=mean, sites=sites, method="each hospital's own test patients")


def example_baselines() -> Baselines:
    """Local-only, pooled, and the paired differences."""
    paired = "paired patient bootstrap, 200 replicates"
    return Baselines(
        local_only={
            "mpcwp_gt_18": LocalOnly(
                auroc=SiteMean(
                    mean=0.709,
                    sites={name: local for name, _, _, _, _, local in SITES},
                    method="each on the hospital's own test patients",
                ),
                reason="no figure for Invented Heart Centre, which has no labels",
            )
        },
        pooled={"mpcwp_gt_18": Pooled(auroc=interval(0.806, 0.033, "DeLong on the logit scale", bound=0.0008))},
        comparisons=Comparisons(
            federated_minus_local_only=Estimate(value=0.084, low=0.055, high=0.113, method=paired),
            federated_minus_pooled=Estimate(value=-0.013, low=-0.031, high=0.004, method=paired),
        ),
        federated=by_site(0.793, 0.0),
        pooled_by_site=by_site(0.806, 0.013),
        oracle_by_site=by_site(0.851, 0.058),
    )


def example_results(**changes: object) -> Results:
    """Whole results of an invented study; `changes` replaces top-level fields."""
    fields: dict[str, object] = {
        "name": "An invented study",
        "created_at": "2026-01-02T03:04:05+00:00",
        "hemofed_version": "0.1.0",
        "release_sha256": "0123456789abcdef" * 4,
        "command": "hemofed-sim run studies/demo.toml --out runs/demo",
        "environment": {"python": "3.11.9", "torch": "2.13.0", "flwr": "1.41.0"},
        "engine": "in-process",
        "seed": 7,
        "simulated": True,
        "seconds": 312.4,
        "study": {
            "name": "An invented study",
            "target": {"column": "mpcwp_mmhg", "threshold": 18.0},
            "encoder": {"preset": "small", "norm": "group"},
            "objective": {"name": "ssl_dml", "distance": "median_beat"},
            "pretrain": {"rounds": 8},
            "finetune": {"rounds": 8},
        },
        "study_digest": "fedcba9876543210" * 4,
        "model": ModelSummary(encoder="1-D ResNet, small preset", parameters=412_000, weights_sha256="ab" * 32),
        "privacy": Privacy(disclosure_tier="in the clear", score_bins=32),
        "sites": example_sites(),
        "oracle_auroc": 0.846,
        "oracle": Oracle(
            value=0.846,
            on_test_patients=0.851,
            patients=50_000,
            noise_ceiling_auroc=0.957,
            definition="P(mPCWP > 18 mmHg | every parameter that shaped the ECG, except the pressure)",
        ),
        "threshold": Threshold(probability=0.31, rule="sensitivity of at least 0.80"),
        "targets": ("mpcwp_gt_18", "mpcwp"),
        "test": {"mpcwp_gt_18": example_classification(), "mpcwp": example_regression()},
        "site_results": tuple(
            SiteResult(name=name, **group_figures(n // 25 * 5, n // 75 * 5, auroc))
            if auroc is not None
            else SiteResult(name=name, **group_figures(None, None, PRIMARY))
            for name, n, _, _, auroc, _ in SITES
        ),
        "subgroups": tuple(
            SubgroupResult(partition=partition, group=group, **group_figures(*figures))
            for partition, group, *figures in GROUPS
        ),
        "fairness": example_fairness(),
        "baselines": example_baselines(),
    }
    return Results.model_validate(fields | changes)


def example_metrics() -> tuple[RoundMetrics, ...]:
    """Eight rounds of each phase; one of them warns."""
    names = tuple(site[0] for site in SITES)
    pretrain = [
        RoundMetrics(
            phase="pretrain",
            round=number,
            seconds=9.5,
            learning_rate=2e-3,
            sites_replied=names,
            train_loss=0.2 + 0.6 * math.exp(-number / 3),
            violating_share=0.1 + 0.5 * math.exp(-number / 4),
            mean_cosine=0.15 + 0.02 * number,
            hub_share=0.04,
        )
        for number in range(1, 9)
    ]
    finetune = [
        RoundMetrics(
            phase="finetune",
            round=number,
            seconds=7.5,
            learning_rate=2e-3,
            sites_replied=names[:3],
            sites_failed=(names[2],) if number == 5 else (),
            train_loss=0.5 + 0.2 * math.exp(-number / 3),
            validation_auroc=0.8 - 0.2 * math.exp(-number / 2),
            warning="one site answered late" if number == 5 else None,
        )
        for number in range(1, 9)
    ]
    return (*pretrain, *finetune)


def example_ecg(rate_per_minute: float = 72.0, caption: str = "Invented patient, 64 years") -> ExampleEcg:
    """A 12-lead ECG of Gaussian waves: enough to see the paper is right; (12, 2500) mV, 250 Hz."""
    time_s = np.arange(2500) / 250
    phase_s = (time_s + 0.35) % (60 / rate_per_minute)
    waves = {
        "P": (0.16, 0.025),
        "Q": (0.29, 0.008),
        "R": (0.31, 0.011),
        "S": (0.335, 0.01),
        "T": (0.55, 0.05),
    }
    shape = {name: np.exp(-0.5 * ((phase_s - centre) / width) ** 2) for name, (centre, width) in waves.items()}
    sizes = {  # mV of P, Q, R, S, T in the eight independent leads
        "I": (0.08, -0.05, 0.6, -0.1, 0.2),
        "II": (0.14, -0.06, 1.0, -0.15, 0.3),
        "V1": (0.05, 0.0, 0.2, -0.9, -0.08),
        "V2": (0.06, 0.0, 0.4, -1.4, 0.4),
        "V3": (0.07, 0.0, 0.8, -0.9, 0.45),
        "V4": (0.07, -0.05, 1.4, -0.4, 0.4),
        "V5": (0.07, -0.08, 1.3, -0.2, 0.3),
        "V6": (0.07, -0.08, 1.0, -0.1, 0.25),
    }
    lead = {
        name: sum(size * wave for size, wave in zip(values, shape.values(), strict=True))
        for name, values in sizes.items()
    }
    one, two = lead["I"], lead["II"]
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    signal = np.stack([*limb, *(lead[f"V{number}"] for number in range(1, 7))])
    noise = np.random.default_rng(1).normal(0, 0.01, signal.shape)
    return ExampleEcg(caption=caption, signal_mv=(signal + noise).astype(np.float32))
