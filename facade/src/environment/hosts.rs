//! SLURM's short forms: a list of hosts (`a[1-3,07-09],b5,c[1-2]-x[3-4]`) and counts of tasks (`2(x3),1`).

/// More hosts than any machine has: a list that asks for more is a mistake.
const MOST: usize = 1 << 20;

/// All hosts of a list, in its order.
pub(super) fn hosts(list: &str) -> Result<Vec<String>, String> {
    let mut hosts = Vec::new();
    for word in words(list)? {
        hosts.extend(expand(word)?);
        if hosts.len() > MOST {
            return Err(format!("names more than {MOST} hosts"));
        }
    }
    match hosts.is_empty() {
        true => Err("names no host".into()),
        false => Ok(hosts),
    }
}

/// The list's words: commas within brackets do not part them.
fn words(list: &str) -> Result<Vec<&str>, String> {
    let (mut words, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, letter) in list.char_indices() {
        match letter {
            '[' if inside => return Err("has brackets within brackets".into()),
            '[' => inside = true,
            ']' if !inside => return Err("has a ']' without its '['".into()),
            ']' => inside = false,
            ',' if !inside => {
                words.push(list[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("has a '[' without its ']'".into());
    }
    words.push(list[start..].trim());
    match words.iter().any(|word| word.is_empty()) {
        true => Err("has an empty name".into()),
        false => Ok(words),
    }
}

/// One word: its first brackets are expanded slowest, as SLURM does.
fn expand(word: &str) -> Result<Vec<String>, String> {
    let Some((before, rest)) = word.split_once('[') else {
        return Ok(vec![word.to_string()]);
    };
    let (ranges, after) = rest.split_once(']').ok_or("has a '[' without its ']'")?;
    let (numbers, tails) = (expand_ranges(ranges)?, expand(after)?);
    if numbers.len().saturating_mul(tails.len()) > MOST {
        return Err(format!("names more than {MOST} hosts"));
    }
    let pairs = numbers
        .iter()
        .flat_map(|number| tails.iter().map(move |tail| (number, tail)));
    Ok(pairs
        .map(|(number, tail)| format!("{before}{number}{tail}"))
        .collect())
}

/// `1-3,07-09` as texts: the zeros in front of a range's begin are kept.
fn expand_ranges(ranges: &str) -> Result<Vec<String>, String> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let parse = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.then(|| text.parse::<usize>().ok()).flatten();
            number.ok_or_else(|| format!("has '{range}' where a range of numbers should be"))
        };
        let (from, to) = (parse(first)?, parse(last)?);
        if from > to {
            return Err(format!("has the range '{range}', which runs backwards"));
        }
        if to - from >= MOST {
            return Err(format!("names more than {MOST} hosts"));
        }
        let width = first.len();
        numbers.extend((from..=to).map(|number| format!("{number:0width$}")));
    }
    Ok(numbers)
}

/// Tasks on each node: `2(x3),1` is 2, 2, 2, 1.
pub(super) fn tasks(counts: &str) -> Result<Vec<usize>, String> {
    let mut tasks = Vec::new();
    for word in counts.split(',') {
        let wrong = || format!("has '{word}' where a count like 2 or 2(x3) should be");
        let (count, times) = match word.split_once("(x") {
            None => (word, 1),
            Some((count, times)) => {
                let times = times.strip_suffix(')').ok_or_else(wrong)?;
                (count, times.parse().map_err(|_| wrong())?)
            }
        };
        if times > MOST {
            return Err(wrong());
        }
        let count = count.parse::<usize>().map_err(|_| wrong())?;
        tasks.extend(std::iter::repeat_n(count, times));
    }
    Ok(tasks)
}

#[cfg(test)]
mod tests {
    use super::*;

    // ENV-02, line 7
    #[test]
    fn line_7_every_form_of_a_host_list() {
        for (list, expected) in [
            ("alpha", "alpha"),
            ("1.1.1.1", "1.1.1.1"),
            ("alpha,beta,gamma", "alpha beta gamma"),
            ("alpha[1-3]", "alpha1 alpha2 alpha3"),
            ("host[22]", "host22"),
            ("host[1,4-5]", "host1 host4 host5"),
            ("node[08-11]", "node08 node09 node10 node11"),
            ("n-[099-101]-ib", "n-099-ib n-100-ib n-101-ib"),
            (
                "a[1-3,07-09],b5,c[1-2]-x[3-4]",
                "a1 a2 a3 a07 a08 a09 b5 c1-x3 c1-x4 c2-x3 c2-x4",
            ),
            ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
            ("a, b", "a b"),
        ] {
            assert_eq!(hosts(list).unwrap().join(" "), expected, "{list}");
        }
    }

    #[test]
    fn broken_host_lists_are_refused_in_words() {
        for (list, words) in [
            ("", "empty name"),
            ("a,,b", "empty name"),
            ("a[1-", "without its ']'"),
            ("a1]", "without its '['"),
            ("a[[1]]", "within brackets"),
            ("a[]", "range of numbers"),
            ("a[x-y]", "range of numbers"),
            ("a[3-1]", "backwards"),
            ("a[1-99999999999]", "more than"),
            ("a[1-9999]b[1-9999]", "more than"),
        ] {
            let text = hosts(list).unwrap_err();
            assert!(text.contains(words), "{list}: {text}");
        }
    }

    // ENV-02
    #[test]
    fn counts_of_tasks() {
        assert_eq!(tasks("2").unwrap(), [2]);
        assert_eq!(tasks("2(x3),1").unwrap(), [2, 2, 2, 1]);
        assert_eq!(tasks("1,2(x2)").unwrap(), [1, 2, 2]);
        for wrong in ["", "x", "2(x", "2(xa)", "2(x9999999)", "2(3)"] {
            assert!(tasks(wrong).is_err(), "{wrong}");
        }
    }
}
