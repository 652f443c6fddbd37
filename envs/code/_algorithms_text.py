"""Right functions on text, stacks and tables, for full tasks. Each is a template for many bugs."""

from __future__ import annotations

from palaestra.envs.code._algorithms import algorithm, ints, text_of


@algorithm(lambda rng: (text_of(rng, "aab", 0, 10),))
def run_length_encode(text: str) -> list[list[object]]:
    """Return the runs of equal letters as [letter, length] pairs, in order."""
    runs: list[list[object]] = []
    position = 0
    while position < len(text):
        end = position + 1
        while end < len(text) and text[end] == text[position]:
            end = end + 1
        runs.append([text[position], end - position])
        position = end
    return runs


@algorithm(lambda rng: ("".join(rng.choices(("()", "[]", "([])", "[()()]", "(", "]", "(]"), k=rng.randint(0, 3))),))
def is_balanced(text: str) -> bool:
    """Say whether round and square brackets are balanced and properly nested."""
    pairs = {")": "(", "]": "["}
    stack: list[str] = []
    for letter in text:
        if letter in pairs:
            if not stack or stack.pop() != pairs[letter]:
                return False
        else:
            stack.append(letter)
    return len(stack) == 0


@algorithm(lambda rng: (text_of(rng, "abcxyz ABZ!", 0, 12), rng.randint(-30, 30)))
def shift_letters(text: str, places: int) -> str:
    """Return text with each lower-case letter moved on in the alphabet by `places`, around its ends."""
    shifted = ""
    for letter in text:
        if "a" <= letter <= "z":
            offset = (ord(letter) - 97 + places) % 26
            shifted = shifted + chr(97 + offset)
        else:
            shifted = shifted + letter
    return shifted


@algorithm(lambda rng: (text_of(rng, "abAB ,", 0, 4) + text_of(rng, "ba", 0, 5),))
def is_palindrome(text: str) -> bool:
    """Say whether the letters read the same backwards, ignoring case and everything that is not a letter."""
    letters = [letter.lower() for letter in text if letter.isalpha()]
    left = 0
    right = len(letters) - 1
    while left < right:
        if letters[left] != letters[right]:
            return False
        left = left + 1
        right = right - 1
    return True


@algorithm(lambda rng: (text_of(rng, "abc", 0, 6), text_of(rng, "abc", 0, 6)))
def edit_distance(one: str, two: str) -> int:
    """Return the fewest insertions, deletions and replacements of a letter that turn one text into the other."""
    row = list(range(len(two) + 1))
    for i in range(1, len(one) + 1):
        previous = row
        row = [i]
        for j in range(1, len(two) + 1):
            cost = 0 if one[i - 1] == two[j - 1] else 1
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + cost))
    return row[len(two)]


@algorithm(lambda rng: (text_of(rng, "abcd", 0, 10),))
def longest_without_repeat(text: str) -> int:
    """Return the length of the longest piece of text in which no letter occurs twice."""
    last_seen: dict[str, int] = {}
    start = 0
    longest = 0
    for position, letter in enumerate(text):
        if letter in last_seen and last_seen[letter] >= start:
            start = last_seen[letter] + 1
        last_seen[letter] = position
        longest = max(longest, position - start + 1)
    return longest


@algorithm(lambda rng: ([text_of(rng, "ab", 1, 2) for _ in range(rng.randint(0, 9))], rng.randint(0, 4)))
def most_common(words: list[str], count: int) -> list[str]:
    """Return the `count` most frequent words, most frequent first, equally frequent ones in alphabetical order."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return ranked[:count]


@algorithm(lambda rng: ([str(rng.randint(1, 9)), str(rng.randint(1, 9)), rng.choice("+-*"), str(rng.randint(1, 9)),
                         rng.choice("+-*")],))  # fmt: skip
def evaluate_postfix(tokens: list[str]) -> int:
    """Return the value of an expression in postfix notation with +, - and *, such as 3 4 - for 3 - 4."""
    stack: list[int] = []
    for token in tokens:
        if token not in ("+", "-", "*"):
            stack.append(int(token))
            continue
        right = stack.pop()
        left = stack.pop()
        if token == "+":
            stack.append(left + right)
        elif token == "-":
            stack.append(left - right)
        else:
            stack.append(left * right)
    return stack[0]


@algorithm(lambda rng: ([text_of(rng, "abcdefgh ", 1, 7) for _ in range(rng.randint(0, 5))], rng.randint(4, 14)))
def wrap_words(words: list[str], width: int) -> list[str]:
    """Return lines filled with words in order, one space between words, none longer than `width` where avoidable."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] = lines[-1] + " " + word
        else:
            lines.append(word)
    return lines


@algorithm(lambda rng: (rng.randint(3, 6), [rng.sample(range(6), 2) for _ in range(rng.randint(3, 9))]))
def distance_from_zero(size: int, edges: list[list[int]]) -> list[int]:
    """Return how many edges each node 0 to size-1 is from node 0 in an undirected graph; -1 if unreachable.

    Edges to nodes outside this range do not count.
    """
    distances = [-1] * size
    distances[0] = 0
    queue = [0]
    while queue:
        node = queue.pop(0)
        for one, two in edges + [[two, one] for one, two in edges]:
            if one == node and two < size and distances[two] == -1:
                distances[two] = distances[node] + 1
                queue.append(two)
    return distances


@algorithm(lambda rng: (ints(rng, 1, 6, least=2, most=9), rng.randint(3, 10)))
def count_pairs_with_sum(values: list[int], target: int) -> int:
    """Return how many pairs of positions i < j have values that sum to `target`."""
    seen: dict[int, int] = {}
    pairs = 0
    for value in values:
        pairs = pairs + seen.get(target - value, 0)
        seen[value] = seen.get(value, 0) + 1
    return pairs


@algorithm(lambda rng: (ints(rng, 0, 9, most=9),))
def next_greater(values: list[int]) -> list[int]:
    """Return for each value the first later value that is greater, or -1 where there is none."""
    answer = [-1] * len(values)
    waiting: list[int] = []
    for position, value in enumerate(values):
        while waiting and values[waiting[-1]] < value:
            answer[waiting.pop()] = value
        waiting.append(position)
    return answer


TEXT_ALGORITHMS = (
    run_length_encode,
    is_balanced,
    shift_letters,
    is_palindrome,
    edit_distance,
    longest_without_repeat,
    most_common,
    evaluate_postfix,
    wrap_words,
    distance_from_zero,
    count_pairs_with_sum,
    next_greater,
)
