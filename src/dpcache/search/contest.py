"""Successive halving: many candidates on few inputs, ever fewer on ever more of them, the last ones on all."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from dpcache.plan.schedule import Schedule

from .candidates import CORRECTED, TREND, TREND_CORRECTED, Candidate, Candidates, KeySteps

#: Of what is left when they begin, the shares that the rounds may spend.
FIRST, SECOND, WAYS, FITS = 0.4, 0.3, 0.35, 0.7
#: Of the first round, so many candidates rather than more inputs; where errors are foretold, the likeliest of all.
FEWEST_FIRST = 30
#: So many inputs the expected error of a candidate is worth.
EXPECTED = 6
#: Of the same key steps so many enter the last round before others do.
MOST_ALIKE = 2
#: After so many inputs the usual ways are looked at; those so many times as bad as the best of them run no further.
LOOK, HOPELESS = 2, 3
#: In the first rounds so many inputs at most: what is gained by more is less than what more ways to predict gain.
MOST_FIRST_INPUTS = 6
#: Choices of key steps that are tried with every way to predict, at least.
FEWEST_SETS = 3
#: So much smaller, relative to the best, an error has to be for the less simple of two to win; and for an unusual way
#: to win over the usual ones: what differs by less on a dozen inputs is chance, and many unusual ways are tried.
TIE, NEAR = 1e-6, 0.03


class Trials(Protocol):
    """Runs candidates."""

    def run(self, candidates: Sequence[Candidate], number: int, beside: int = 0) -> bool:
        """Has every candidate's error on the input of this number; False if the budget does not allow that.

        Args:
            candidates: what to run.
            number: of the input.
            beside: so many other runs, which share nothing, have to stay affordable.
        """

    def fit(self, candidate: Candidate, beside: int = 0) -> Schedule | None:
        """Its schedule with coefficients fitted in runs; None if the budget does not allow that, or nothing is seen.

        Args:
            candidate: what to start from.
            beside: as in `run`.
        """

    @property
    def runs_to_fit(self) -> int:
        """How many runs that takes, which share nothing; 0 if nothing can be fitted."""

    def affordable(self, beside: int = 0, *, shared: bool = True) -> float:
        """How many runs the budget still allows beside so many others: runs that share as those so far, or nothing."""


class Contest:
    """Finds the best candidate for one number of key steps.

    Args:
        candidates: makes them.
        num_inputs: how many inputs there are to judge by.
        trials: runs them.
        average: what the errors of several inputs amount to.
        expects: whether errors are what candidates say to expect; a metric of the user's own is not.

    Attributes:
        tried: candidates that have run at least once.
        finalists: those of the last round.
    """

    def __init__(
        self,
        candidates: Candidates,
        num_inputs: int,
        trials: Trials,
        average: Callable[[Sequence[float]], float],
        *,
        expects: bool = True,
    ) -> None:
        self._candidates, self._num_inputs = candidates, num_inputs
        self._trials, self._average, self._expects = trials, average, expects
        self._usual = candidates.usual()
        self.tried: list[Candidate] = []
        self.finalists: list[Candidate] = []

    def best(self) -> Candidate:
        """The candidate with the least error on all judging inputs, or on as many as the budget allows."""
        self._drop_hopeless()
        field = self._ranked(self._field())
        inputs = self._first_inputs(field)
        field = self._run(field[: self._within(FIRST, inputs)], inputs)
        more = min(self._num_inputs, 2 * inputs)
        field = self._run(self._ranked(field)[: self._within(SECOND, more - inputs)], more)
        ways = self._candidates.ways()
        num_sets = max(FEWEST_SETS, self._within(WAYS, more) // len(ways))
        sets = list(dict.fromkeys(one.keys for one in self._ranked(field)))[:num_sets]
        made = dict.fromkeys(self._candidates.make(keys, way) for keys in sets for way in ways)
        fresh = [one for one in made if one not in self.tried]
        self._run(fresh[: self._within(WAYS, more)], more)
        self._fit(more)
        return self._final()

    def _fit(self, inputs: int) -> None:
        """Has the best choices of key steps fitted, each from several ways to predict; the best one's first."""
        each = self._trials.runs_to_fit + inputs
        number = int(FITS * self._trials.affordable(self._missing, shared=False) / each) if each > inputs else 0
        ranked = self._ranked([one for one in self.tried if len(one.errors) >= inputs])
        best = {one.keys: one for one in reversed(ranked)}  # of its key steps the best
        bases: dict[Candidate, None] = {}
        for keys in dict.fromkeys(one.keys for one in ranked):
            ways = (TREND_CORRECTED, TREND, CORRECTED)
            usual = [self._candidates.make(keys, way) for way in ways if way in self._candidates.ways()]
            bases |= dict.fromkeys([best[keys], *usual])
        made = []
        for base in list(bases)[:number]:
            if (schedule := self._trials.fit(base, self._missing + inputs)) is not None:
                made.append(self._candidates.fitted(base, schedule))
        self._run([one for one in dict.fromkeys(made) if one not in self.tried], inputs)

    def _final(self) -> Candidate:
        """The best of the usual ways and the best others, on all inputs if the budget allows that."""
        unusual = [one for one in self.tried if one not in self._usual]
        known = max((len(one.errors) for one in unusual), default=0)
        ranked = self._ranked([one for one in unusual if len(one.errors) == known])
        seen: Counter[KeySteps] = Counter()
        first: list[Candidate] = []
        later: list[Candidate] = []
        for one in ranked:
            (first if seen[one.keys] < MOST_ALIKE else later).append(one)
            seen[one.keys] += 1
        others = first + later
        self._run(self._usual, self._num_inputs)
        missing = self._num_inputs - known
        if missing:
            others = others[: max(1, int(self._trials.affordable(shared=False) / missing))]
        self._run(others, self._num_inputs)
        self.finalists = [one for one in self._usual if one.errors] or self._usual[:1]
        # Where none could run on every input, the best is held against the usual ways on those that it has seen.
        self.finalists += [one for one in others if len(one.errors) == self._num_inputs] or others[:1]
        return self._least(self.finalists)

    def _drop_hopeless(self) -> None:
        """Usual ways that are far behind on the first inputs are not run on all."""
        known = self._run(self._usual, min(LOOK, self._num_inputs))
        if self._num_inputs > LOOK and len(known) == len(self._usual) and self._expects:
            least = min(self._value(one, LOOK) for one in known)
            self._usual = [one for one in known if self._value(one, LOOK) <= HOPELESS * least]

    def _first_inputs(self, field: Sequence[Candidate]) -> int:
        """On how many inputs the first round runs."""
        foretold = self._expects and any(one.expected is not None for one in field)
        number = min(len(field), FEWEST_FIRST) if foretold else len(field)
        fit = self._spendable() * FIRST / max(1, number)
        return max(1, min(int(fit), math.ceil(self._num_inputs / 2), MOST_FIRST_INPUTS))

    def _field(self) -> list[Candidate]:
        """Every choice of key steps with two ways to predict, the likeliest first."""
        ways = (TREND, self._candidates.second)
        made = (self._candidates.make(keys, way) for keys in self._candidates.key_steps for way in ways)
        return list(dict.fromkeys(made))

    @property
    def _missing(self) -> int:
        """Runs of the usual ways, which run on all inputs, that are still to come."""
        return sum(self._num_inputs - len(one.errors) for one in self._usual)

    def _spendable(self) -> float:
        """How many runs the usual ways leave over."""
        return self._trials.affordable(self._missing)

    def _within(self, share: float, inputs: int) -> int:
        """How many candidates may run on so many more inputs each, of a share of what is left over."""
        return int(share * self._spendable() / inputs) if inputs else len(self.tried)

    def _run(self, candidates: Sequence[Candidate], inputs: int) -> list[Candidate]:
        """Runs the candidates on the first so many inputs; those that have run on all of these."""
        beside = 0 if candidates is self._usual else self._missing
        for number in range(inputs):
            if candidates and not self._trials.run(candidates, number, beside):
                break
        self.tried += [one for one in candidates if one.errors and one not in self.tried]
        return [one for one in candidates if len(one.errors) >= inputs]

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best first, by the inputs that all of them have run on and what to expect; equal ones as they come."""
        count = min((len(one.errors) for one in candidates), default=0)
        return sorted(candidates, key=lambda one: self._score(one, count))

    def _score(self, candidate: Candidate, count: int) -> float:
        """Its error on so many inputs, drawn towards what is to be expected: a few inputs show few bad cases."""
        expected = self._foretold(candidate)
        return float(self._value(candidate, count) * expected ** min(1.0, EXPECTED / max(count, 1)))

    def _foretold(self, candidate: Candidate) -> float:
        return candidate.expected if self._expects and candidate.expected is not None else 1.0

    def _value(self, candidate: Candidate, count: int) -> float:
        return self._average([candidate.errors[number] for number in range(count)]) if count else 1.0

    def _least(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best that is not worse than a plain way; of the usual ways one if it is nearly as good as any.

        Of those as good the simplest, which comes first.
        """
        count = min(len(one.errors) for one in candidates)
        plain = [self._value(one, count) for one in candidates if one.is_plain]
        limit = min(plain, default=math.inf)
        able = [one for one in candidates if _reaches(self._value(one, count), limit, TIE)]
        scores = {one: self._score(one, count) for one in able}
        least = min(scores.values())
        near = [one for one in able if one in self._usual and _reaches(scores[one], least, NEAR)]
        best = min(scores[one] for one in near or able)
        return next(one for one in near or able if _reaches(scores[one], best, TIE))


def _reaches(value: float, limit: float, slack: float) -> bool:
    """Whether a value, lower is better, is above a limit by no more than a share of it."""
    return value <= limit + slack * abs(limit)
