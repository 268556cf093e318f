"""What students write for lesson 00's build task, and the phrase that answers each."""

GIVEN = "from statistics import median"
RIGHT = '''
def my_bandwidth(read, nbytes, clock):
    read()
    rates = []
    for _ in range(9):
        calls, start, elapsed = 0, clock(), 0
        while elapsed < 0.02:
            read()
            calls += 1
            elapsed = clock() - start
        rates.append(calls * nbytes / elapsed)
    return median(rates)
'''
ONE_LONG_SAMPLE = '''
def my_bandwidth(read, nbytes, clock):
    calls, start = 0, clock()
    while clock() - start < 0.2:
        read()
        calls += 1
    return calls * nbytes / (clock() - start)
'''
ONE_CALL = '''
def my_bandwidth(read, nbytes, clock):
    read()
    start = clock()
    read()
    return nbytes / (clock() - start)
'''
SINGLE_CALLS = '''
def my_bandwidth(read, nbytes, clock):
    read()
    seconds = []
    for _ in range(101):
        start = clock()
        read()
        seconds.append(clock() - start)
    return nbytes / SUMMARY(seconds)
'''
A_THOUSAND = '''
def my_bandwidth(read, nbytes, clock):
    read()
    rates = []
    for _ in range(5):
        start = clock()
        for _ in range(1000):
            read()
        rates.append(1000 * nbytes / (clock() - start))
    return median(rates)
'''
UNTIL_IT_IS_LONG = '''
def my_bandwidth(read, nbytes, clock):
    read()
    calls, elapsed = 1, 0
    while elapsed < 0.05:
        calls, start = 2 * calls, clock()
        for _ in range(calls):
            read()
        elapsed = clock() - start
    return calls * nbytes / elapsed
'''
ANSWERS = {
    "right": RIGHT,
    "right, with fewer and longer samples":
        RIGHT.replace("0.02", "0.05").replace("range(9)", "range(5)"),
    "counts the cold first call": ONE_LONG_SAMPLE,
    "takes the mean": RIGHT.replace("median(rates)", "sum(rates) / len(rates)"),
    "takes the best": RIGHT.replace("median(rates)", "max(rates)"),
    "counts numbers": RIGHT.replace("calls * nbytes", "calls * nbytes / 4"),
    "counts GiB": RIGHT.replace("return median(rates)", "return median(rates) / 2**30"),
    "counts GB": RIGHT.replace("return median(rates)", "return median(rates) / 1e9"),
    "counts bits": RIGHT.replace("return median(rates)", "return 8 * median(rates)"),
    "is upside down": RIGHT.replace("calls * nbytes / elapsed", "elapsed / (calls * nbytes)"),
    "forgets how many calls": RIGHT.replace("calls * nbytes", "nbytes"),
    "times one call": ONE_CALL,
    "median of single calls": SINGLE_CALLS.replace("SUMMARY", "median"),
    "best of single calls": SINGLE_CALLS.replace("SUMMARY", "min"),
    "a thousand calls": A_THOUSAND,
    "forgets to return": RIGHT.replace("    return median(rates)", "    median(rates)"),
    "one sample of doubled calls": UNTIL_IT_IS_LONG,
}
MESSAGES = {
    "counts the cold first call": "cold first call does not count",
    "takes the mean": "one interrupted call does not count",
    "takes the best": "one lucky call does not count",
    "counts numbers": "numbers of 4 bytes",
    "counts GiB": "GiB/s, not bytes/s",
    "counts GB": "GB/s, not bytes/s",
    "counts bits": "bits, not bytes",
    "is upside down": "seconds per byte",
    "forgets how many calls": "times as much",
    "times one call": "in the same tick",
    "median of single calls": "in the same tick",
    "best of single calls": "in the same tick",
    "a thousand calls": "it is done after 5 seconds",
    "forgets to return": "returned None",
    "one sample of doubled calls": "one interrupted call does not count",
}
