"""What known devices say of one not seen yet: a Gaussian prior of its latencies, and what measurements make of it.

Latencies are in shares of a device's mean, so that devices of all speeds compare. A new device's shares are
``features @ prices + rest``: the prices with the mean and covariance of the known devices' prices, the rest a Gaussian
process with small variance over networks that known devices treat alike, and over ones of like structure.

The constants were chosen on validation devices, each predicted from devices of other families.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

RIDGE = 1e-3
"""On the prices of one known device."""

SHRINKAGE = 0.2
"""Of the prices' covariance towards its diagonal: there are fewer devices than entries."""

STRAY = 3.0
"""Variance of all prices alike, in mean variances of known prices, for devices unlike all known ones."""

STRAY_SHARE = 0.5
COMPONENTS = 4
ALIKE_DEVIATION, ALIKE_LENGTH = 0.03, 2.0
STRUCTURE_DEVIATION, STRUCTURE_LENGTH = 0.04, 2.12
PRICE_DEVIATION, INTERCEPT_DEVIATION = 0.3, 0.1
"""Of a device's shares when no device is known."""

NOISE_UNKNOWN = 0.03
NOISE_LEAST = 0.01
NOISES = (0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
SCALES = (0.3, 1.0, 3.0, 10.0)
FREEDOM = 4.0
"""Degrees of freedom of the noise: phones give single latencies of many times the usual."""

ROUNDS = 5
LEAST_SHARE = 0.2
"""A network's share counts as at least this much where noise is taken to grow with it."""


@dataclass(frozen=True, kw_only=True)
class DevicePrior:
    """Prior of a new device's shares.

    Attributes:
        features: ``(n, p)``, ones first, the others standardised.
        alike: ``(n, c)`` principal components of the known devices' latencies.
        prices: ``(p,)`` their mean.
        covariances: of the prices ``(p, p)``, the second for devices that stray.
        noise: standard deviation of what the features do not explain.
        alike_deviation: of the process over ``alike``.
    """

    features: Matrix
    alike: Matrix
    prices: Vector
    covariances: tuple[Matrix, ...]
    noise: float
    alike_deviation: float

    def mean_of(self, rows: Rows) -> Vector:
        mean: Vector = self.features[rows] @ self.prices
        return mean

    def covariance(self, which: int, first: Rows, second: Rows) -> Matrix:
        """``(len(first), len(second))`` under one of ``covariances``."""
        left, right = self.features[first], self.features[second]
        total: Matrix = left @ self.covariances[which] @ right.T
        if self.features.shape[1] > 1:
            root = np.sqrt(self.features.shape[1] - 1)
            total += STRUCTURE_DEVIATION**2 * rbf(left[:, 1:] / root, right[:, 1:] / root, STRUCTURE_LENGTH)
        if self.alike_deviation:
            total += self.alike_deviation**2 * rbf(self.alike[first], self.alike[second], ALIKE_LENGTH)
        return total

    def variance(self, which: int, rows: Rows) -> Vector:
        """The diagonal of ``covariance``."""
        left = self.features[rows]
        total: Vector = ((left @ self.covariances[which]) * left).sum(axis=1) + self.alike_deviation**2
        return total + (STRUCTURE_DEVIATION**2 if self.features.shape[1] > 1 else 0.0)


def rbf(first: Matrix, second: Matrix, length: float) -> Matrix:
    """``exp(-|a - b|^2 / 2 length^2)`` of each pair."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    kernel: Matrix = np.exp(-np.maximum(squares, 0.0) / (2 * length**2))
    return kernel


def standardised(values: Matrix) -> Matrix:
    """Columns of mean 0 and deviation 1; constant ones become 0."""
    centred = values - values.mean(axis=0)
    deviation = values.std(axis=0)
    constant = deviation <= 1e-9 * np.abs(values).max(axis=0, initial=0.0)
    result: Matrix = np.where(constant, 0.0, centred / np.where(constant, 1.0, deviation))
    return result


def device_prior(structure: Matrix, known: Matrix) -> DevicePrior:
    """The prior from structural features ``(n, p)`` and known devices' latencies ``(n, D)``, NaN where unknown."""
    n, devices = known.shape
    features = np.hstack([np.ones((n, 1)), standardised(structure)])
    p = features.shape[1]
    weak = np.diag([INTERCEPT_DEVIATION**2, *[PRICE_DEVIATION**2 / max(1, p - 1)] * (p - 1)])
    if devices == 0:
        first = np.eye(p)[0]
        return DevicePrior(
            features=features,
            alike=np.zeros((n, 1)),
            prices=first,
            covariances=(weak,),
            noise=NOISE_UNKNOWN,
            alike_deviation=0.0,
        )
    shares = known / np.nanmean(known, axis=0)
    prices, residuals = np.zeros((devices, p)), np.zeros(devices)
    for device in range(devices):
        given = ~np.isnan(shares[:, device])
        design, target = features[given], shares[given, device]
        penalty = RIDGE * np.eye(p)
        penalty[0, 0] = 0.0
        count = len(target)
        prices[device] = np.linalg.solve(design.T @ design / count + penalty, design.T @ target / count)
        residuals[device] = (target - design @ prices[device]).std()
        # Unknown latencies as the device's own prices have them, so that a network may lack them on every device.
        shares[~given, device] = features[~given] @ prices[device]
    mean = prices.mean(axis=0)
    return DevicePrior(
        features=features,
        alike=_components(shares),
        prices=mean,
        covariances=(weak,) if devices == 1 else _covariances(prices - mean),
        noise=float(np.median(residuals)),
        alike_deviation=ALIKE_DEVIATION,
    )


def _covariances(apart: Matrix) -> tuple[Matrix, ...]:
    """Of devices like the known ones, and of ones that stray; ``apart`` is ``(D, p)``, prices less their mean."""
    p = apart.shape[1]
    found = apart.T @ apart / (len(apart) - 1)
    found = (1 - SHRINKAGE) * found + SHRINKAGE * np.diag(np.diag(found))
    found += np.eye(p) * max(1e-6 * float(np.trace(found)), 1e-8)
    each = float(np.diag(found)[1:].mean()) if p > 1 else 0.0
    alike = np.diag([found[0, 0] + 1e-4, *[max(STRAY * each, 1e-4 / p)] * (p - 1)])
    return found, (1 - STRAY_SHARE) * found + STRAY_SHARE * alike


def _components(shares: Matrix) -> Matrix:
    """``(n, c)`` leading principal components of the devices' standardised columns, the first of deviation 1."""
    columns = standardised(shares)
    values, vectors = np.linalg.eigh(columns.T @ columns / len(columns))
    if values[-1] <= 0:
        return np.zeros((len(shares), 1))
    leading: Matrix = (columns @ vectors[:, ::-1][:, :COMPONENTS]) / np.sqrt(values[-1])
    return leading


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """A device's shares after measurements, under one covariance; noise and scale averaged over a grid.

    Attributes:
        prior, which: of what.
        rows: ``(m,)`` measured.
        ms_per_share: the device's unit.
        roots: ``(m,)`` square roots of the measurements' weights.
        basis: ``(m, m)`` eigenvectors of their weighted covariance.
        grid: ``(g, 3)`` probability, noise, and scale of each combination that matters.
        solved: ``(g, m)`` the weighted residuals in the basis over the total variances.
        spectra: ``(g, m)`` these variances.
        log_evidence: of the measurements in ms.
    """

    prior: DevicePrior
    which: int
    rows: Rows
    ms_per_share: float
    roots: Vector
    basis: Matrix
    grid: Matrix
    solved: Matrix
    spectra: Matrix
    log_evidence: float

    def moments(self, rows: Rows) -> tuple[Vector, Vector]:
        """Means in ms and variances in ms^2, noise included, of measuring these rows."""
        start = self.prior.mean_of(rows)
        across = self.prior.covariance(self.which, rows, self.rows) * self.roots @ self.basis
        before = self.prior.variance(self.which, rows)
        growth = np.maximum(start, LEAST_SHARE)
        first, second = np.zeros(len(rows)), np.zeros(len(rows))
        for (weight, noise, scale), solved, spectrum in zip(self.grid, self.solved, self.spectra, strict=True):
            mean = start + scale * (across @ solved)
            variance = scale * before - scale**2 * (across**2 @ (1 / spectrum)) + noise**2 * growth
            first += weight * mean
            second += weight * (np.maximum(variance, 0.0) + mean**2)
        variance = np.maximum(second - first**2, 0.0)
        return first * self.ms_per_share, variance * self.ms_per_share**2


def condition(prior: DevicePrior, which: int, rows: Rows, ms: Vector) -> Posterior:
    """The posterior given latencies ``(m,)`` in ms of rows ``(m,)``.

    The noise has Student's distribution: rounds of expectation-maximisation give outliers small weights. They begin
    once with the noise that fits best, which may excuse outliers, and once with that of known devices, which may see
    too many; the evidence says which end is the better one.
    """
    start = prior.mean_of(rows)
    unit = float(np.median(ms / np.maximum(start, LEAST_SHARE)))
    noises, scales = (axis.ravel() for axis in np.meshgrid(NOISES, SCALES, indexing="ij"))
    usual = max(prior.noise, NOISE_LEAST)
    problem = _Problem(
        covariance=prior.covariance(which, rows, rows),
        residual=ms / unit - start,
        growth=1 / np.maximum(start, LEAST_SHARE),
        noises=noises,
        scales=scales,
        belief=-0.5 * np.log(noises / usual) ** 2 - 0.5 * np.log(scales) ** 2,
    )
    usual_index = int(np.argmin(np.abs(np.log(noises / usual)) + np.abs(np.log(scales))))
    ends = [problem.solved(problem.weights(first)) for first in (None, usual_index)]
    end = max(ends, key=lambda each: float(np.logaddexp.reduce(each.evidence)))
    probability = np.exp(end.evidence - end.evidence.max())
    matters = probability > 1e-3 * probability.sum()
    probability = probability[matters] / probability[matters].sum()
    return Posterior(
        prior=prior,
        which=which,
        rows=rows,
        ms_per_share=unit,
        roots=end.roots,
        basis=end.basis,
        grid=np.stack([probability, noises[matters], scales[matters]], axis=1),
        solved=end.turned / end.spectra[matters],
        spectra=end.spectra[matters],
        # A share's density is one of ms times the unit.
        log_evidence=float(np.logaddexp.reduce(end.evidence)) - len(ms) * float(np.log(unit)) - float(which),
    )


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """For given weights: their roots, the eigenvectors of the weighted covariance, its spectra ``(g, m)`` with noise,
    the residuals turned into the eigenvectors, and the log evidence ``(g,)`` of each noise and scale."""

    roots: Vector
    basis: Matrix
    spectra: Matrix
    turned: Vector
    evidence: Vector


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Residuals ``(m,)`` with their covariance at scale 1; ``growth`` divides the noise's variance of each."""

    covariance: Matrix
    residual: Vector
    growth: Vector
    noises: Vector
    scales: Vector
    belief: Vector

    def solved(self, weights: Vector) -> _Solved:
        roots = np.sqrt(weights)
        values, basis = np.linalg.eigh(self.covariance * roots[:, None] * roots)
        spectra = self.scales[:, None] * np.maximum(values, 0.0) + self.noises[:, None] ** 2
        turned = basis.T @ (self.residual * roots)
        evidence = self.belief - 0.5 * (turned**2 / spectra).sum(axis=1) - 0.5 * np.log(spectra).sum(axis=1)
        # The density of weighted residuals as one of residuals, and Student's price of a weight other than 1.
        trust = weights / self.growth
        evidence += 0.5 * np.log(weights).sum() + FREEDOM / 2 * (np.log(trust) - trust + 1).sum()
        return _Solved(roots=roots, basis=basis, spectra=spectra, turned=turned, evidence=evidence)

    def weights(self, first: int | None) -> Vector:
        """The weights after ``ROUNDS``, of which the first one takes this noise and scale, by default the best."""
        weights = self.growth
        for turn in range(ROUNDS):
            found = self.solved(weights)
            at = first if turn == 0 and first is not None else int(found.evidence.argmax())
            noise, scale, spectrum = self.noises[at], self.scales[at], found.spectra[at]
            across = self.covariance * found.roots @ found.basis
            left = self.residual - scale * across @ (found.turned / spectrum)
            variance = scale * np.diag(self.covariance) - scale**2 * (across**2 @ (1 / spectrum))
            squares = self.growth * (left**2 + np.maximum(variance, 0.0)) / noise**2
            weights = self.growth * (FREEDOM + 1) / (FREEDOM + squares)
        return weights
