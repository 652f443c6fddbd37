"""Right functions on numbers, grids and lists of numbers, for full tasks. Each is a template for many bugs."""

from __future__ import annotations

from palaestra.envs.code._algorithms import algorithm, ints


@algorithm(lambda rng: (rng.randint(1, 90), rng.randint(1, 90)))
def greatest_common_divisor(a: int, b: int) -> int:
    """Return the greatest common divisor of two positive integers."""
    while b > 0:
        a, b = b, a % b
    return a


@algorithm(lambda rng: (rng.randint(0, 12), rng.randint(0, 9), rng.randint(1, 13)))
def power_modulo(base: int, exponent: int, modulus: int) -> int:
    """Return base ** exponent % modulus by repeated squaring."""
    result = 1 % modulus
    base = base % modulus
    while exponent > 0:
        if exponent % 2 == 1:
            result = result * base % modulus
        base = base * base % modulus
        exponent = exponent // 2
    return result


@algorithm(lambda rng: (rng.randint(0, 40),))
def primes_up_to(limit: int) -> list[int]:
    """Return all primes that are at most `limit`, in increasing order."""
    primes: list[int] = []
    for candidate in range(2, limit + 1):
        if all(candidate % prime != 0 for prime in primes):
            primes.append(candidate)
    return primes


@algorithm(lambda rng: (rng.randint(1, 200),))
def prime_factors(number: int) -> list[int]:
    """Return the prime factors of a positive integer in increasing order, with repetition; none for 1."""
    factors = []
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number = number // divisor
        divisor = divisor + 1
    if number > 1:
        factors.append(number)
    return factors


@algorithm(lambda rng: (sorted(ints(rng, 0, 30, most=9)), rng.randint(0, 30)))
def insertion_point(values: list[int], target: int) -> int:
    """Return the first position of a sorted list whose value is at least `target`, else its length."""
    low = 0
    high = len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < target:
            low = middle + 1
        else:
            high = middle
    return low


@algorithm(lambda rng: (ints(rng, -9, 9, least=1, most=9),))
def largest_sum_of_slice(values: list[int]) -> int:
    """Return the largest sum of any non-empty run of neighbouring values of a non-empty list."""
    best = values[0]
    current = values[0]
    for value in values[1:]:
        current = max(current + value, value)
        best = max(best, current)
    return best


@algorithm(lambda rng: (rng.randint(0, 300), rng.randint(2, 9)))
def digits_in_base(number: int, base: int) -> list[int]:
    """Return the digits of a number of at least 0 in a base, most significant first; [0] for 0."""
    if number == 0:
        return [0]
    digits = []
    while number > 0:
        digits.append(number % base)
        number = number // base
    return digits[::-1]


@algorithm(lambda rng: (rng.randint(1, 300),))
def roman_numeral(number: int) -> str:
    """Return a positive integer as a Roman numeral in capital letters."""
    symbols = [(100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
    numeral = ""
    for value, symbol in symbols:
        while number >= value:
            numeral = numeral + symbol
            number = number - value
    return numeral


@algorithm(lambda rng: (sorted(ints(rng, 0, 20, most=6)), sorted(ints(rng, 0, 20, most=6))))
def merge_sorted(left: list[int], right: list[int]) -> list[int]:
    """Return the values of two sorted lists as one sorted list."""
    merged = []
    i = 0
    j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i = i + 1
        else:
            merged.append(right[j])
            j = j + 1
    return merged + left[i:] + right[j:]


@algorithm(lambda rng: ([sorted(rng.sample(range(30), 2)) for _ in range(rng.randint(0, 6))],))
def merge_intervals(intervals: list[list[int]]) -> list[list[int]]:
    """Return the union of closed intervals [start, end] as intervals that do not touch, in increasing order."""
    merged: list[list[int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


@algorithm(lambda rng: (ints(rng, 0, 9, most=9), rng.randint(-12, 12)))
def rotate_right(values: list[int], steps: int) -> list[int]:
    """Return a list rotated to the right by `steps` places; negative steps rotate to the left."""
    if len(values) == 0:
        return []
    shift = steps % len(values)
    return values[len(values) - shift :] + values[: len(values) - shift]


@algorithm(lambda rng: ([ints(rng, 0, 9, least=3, most=3) for _ in range(rng.randint(1, 4))],))
def transpose(rows: list[list[int]]) -> list[list[int]]:
    """Return a rectangular grid with rows and columns exchanged."""
    columns = []
    for column in range(len(rows[0])):
        columns.append([rows[row][column] for row in range(len(rows))])
    return columns


@algorithm(lambda rng: (rng.randint(0, 30), sorted(rng.sample(range(1, 12), rng.randint(1, 3)))))
def fewest_coins(amount: int, coins: list[int]) -> int:
    """Return the smallest number of coins that sum to `amount`, each usable any number of times; -1 if none do."""
    fewest = [0] + [amount + 1] * amount
    for total in range(1, amount + 1):
        for coin in coins:
            if coin <= total:
                fewest[total] = min(fewest[total], fewest[total - coin] + 1)
    return fewest[amount] if fewest[amount] <= amount else -1


@algorithm(lambda rng: (ints(rng, 0, 12, most=9),))
def longest_increasing(values: list[int]) -> int:
    """Return the length of the longest strictly increasing subsequence, whose members need not be neighbours."""
    lengths: list[int] = []
    for i in range(len(values)):
        best = 1
        for j in range(i):
            if values[j] < values[i]:
                best = max(best, lengths[j] + 1)
        lengths.append(best)
    return max(lengths, default=0)


NUMBER_ALGORITHMS = (
    greatest_common_divisor,
    power_modulo,
    primes_up_to,
    prime_factors,
    insertion_point,
    largest_sum_of_slice,
    digits_in_base,
    roman_numeral,
    merge_sorted,
    merge_intervals,
    rotate_right,
    transpose,
    fewest_coins,
    longest_increasing,
)
