//! The table.

/// Times of one operation, in nanoseconds.
pub struct Times {
    median: f64,
    p99: f64,
    samples: usize,
}

impl Times {
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |percent: usize| times.get(times.len() * percent / 100).copied();
        Self {
            median: at(50).unwrap_or_default(),
            p99: at(99).unwrap_or_default(),
            samples: times.len(),
        }
    }
}

#[derive(Default)]
pub struct Report {
    rows: Vec<(String, Times)>,
}

impl Report {
    pub fn add(&mut self, name: String, times: Times) {
        self.rows.push((name, times));
    }

    /// Prints medians, and their ratios to the first row's.
    pub fn print(&self) {
        let base = self.rows.first().map_or(1.0, |(_, times)| times.median);
        println!("| store | median | p99 | ratio | samples |");
        println!("| --- | ---: | ---: | ---: | ---: |");
        for (name, times) in &self.rows {
            println!(
                "| {name} | {:.4} | {:.4} | {:.0} | {} |",
                times.median / 1e3,
                times.p99 / 1e3,
                times.median / base,
                times.samples
            );
        }
    }
}
