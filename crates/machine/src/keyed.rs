//! Option values of the form `key=value,key=value`, and sizes.

/// The values of the given keys in `text`, in the order of `keys`. A key may be missing, but not
/// occur twice, and there must be no other.
pub fn values<'t, const N: usize>(
    text: &'t str,
    keys: [&str; N],
) -> Result<[Option<&'t str>; N], String> {
    let mut values = [None; N];
    let known = || keys.map(|k| format!("{k}=…")).join(",");
    for part in text.split(',') {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| format!("'{part}' has no '=': expected {}", known()))?;
        let index = keys
            .iter()
            .position(|k| *k == key)
            .ok_or_else(|| format!("there is no key '{key}': expected {}", known()))?;
        if values[index].replace(value).is_some() {
            return Err(format!("key '{key}' is given twice: give it once"));
        }
    }
    Ok(values)
}

/// A size in bytes: a number with an optional suffix K, M, G or T, powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "'{text}' is no size: give a number with K, M, G or T, as in size=512M"
        ));
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("'{text}' is too large a size: give less, as in size=512M"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1k"), Ok(1 << 10));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("3G"), Ok(3 << 30));
        assert_eq!(size("1T"), Ok(1 << 40));
        for wrong in ["", "M", "1MB", "1.5G", "+1M", "-1", " 1", "0x10", "é"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert!(
            size("18446744073709551616")
                .unwrap_err()
                .contains("too large")
        );
        assert!(size("16777216T").unwrap_err().contains("too large"));
    }

    #[test]
    fn keys_come_in_any_order() {
        assert_eq!(values("b=2,a=1", ["a", "b"]), Ok([Some("1"), Some("2")]));
        assert_eq!(values("b=x=y", ["a", "b"]), Ok([None, Some("x=y")]));
    }

    #[test]
    fn wrong_keys_are_named() {
        assert!(
            values("a=1,a=2", ["a"])
                .unwrap_err()
                .contains("'a' is given twice")
        );
        assert!(values("c=1", ["a"]).unwrap_err().contains("'c'"));
        assert!(values("", ["a"]).unwrap_err().contains("expected a="));
        assert!(values("a=1,", ["a"]).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".*") {
            let _ = size(&text);
            let _ = values(&text, ["a", "b"]);
        }
    }
}
