//! Dates of the proleptic Gregorian calendar in UTC, and their seconds since 1970.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    pub year: u32,
    /// 1 to 12.
    pub month: u32,
    /// 1 to 31.
    pub day: u32,
    pub hour: u32,
    pub minute: u32,
    pub second: u32,
}

/// Days from 1970-01-01 to the first of March of `year`. Years that begin in March have their
/// leap day at the end, so the months before it have fixed lengths.
fn days_to_march(year: i64) -> i64 {
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) - 719_468
}

/// Days from the first of March to the first of the month so many months later.
fn days_of_months(months: i64) -> i64 {
    (months * 153 + 2) / 5
}

impl DateTime {
    pub fn from_seconds(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let time = seconds.rem_euclid(86_400) as u32;
        // An estimate that is never too small, and at most one too large.
        let mut year = (days + 719_468) * 400 / 146_097 + 1;
        while days_to_march(year) > days {
            year -= 1;
        }
        let in_year = days - days_to_march(year);
        let months = (0..12)
            .rev()
            .find(|&months| days_of_months(months) <= in_year)
            .unwrap_or(0);
        let month = (months + 2) % 12 + 1;
        Self {
            year: (year + i64::from(month <= 2)).max(0) as u32,
            month: month as u32,
            day: (in_year - days_of_months(months) + 1) as u32,
            hour: time / 3_600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    pub fn to_seconds(self) -> i64 {
        let months = (i64::from(self.month) + 9).rem_euclid(12);
        let year = i64::from(self.year) - i64::from(self.month <= 2);
        let days = days_to_march(year) + days_of_months(months) + i64::from(self.day) - 1;
        let minutes = i64::from(self.hour) * 60 + i64::from(self.minute);
        (days * 1_440 + minutes) * 60 + i64::from(self.second)
    }

    /// 1 for Sunday to 7.
    pub fn weekday(self) -> u32 {
        // 1970-01-01 was a Thursday.
        ((self.to_seconds().div_euclid(86_400) + 4).rem_euclid(7) + 1) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        for (seconds, date, weekday) in [
            (0, (1970, 1, 1), 5),
            (951_782_400, (2000, 2, 29), 3),
            (1_709_164_800, (2024, 2, 29), 5),
            (4_107_542_400, (2100, 3, 1), 2),
            (-86_400, (1969, 12, 31), 4),
        ] {
            let found = DateTime::from_seconds(seconds);
            assert_eq!((found.year, found.month, found.day), date);
            assert_eq!(found.weekday(), weekday);
        }
    }

    #[test]
    fn every_day_of_four_centuries_comes_back_in_order() {
        let mut last = DateTime::from_seconds(-86_400);
        for day in 0..146_097 {
            let date = DateTime::from_seconds(day * 86_400 + 3_661);
            assert_eq!(date.to_seconds(), day * 86_400 + 3_661);
            let next_day = date.month == last.month && date.day == last.day + 1;
            let next_month = date.day == 1 && (28..=31).contains(&last.day);
            assert!(next_day || next_month, "{last:?} {date:?}");
            last = date;
        }
    }
}
